"""Ranking with a budget of model calls: questions in rounds, batched, kept and counted."""

from shoal.rank.executor import Cost, Run, run
from shoal.rank.forecast import Forecast, plan
from shoal.rank.oracle import Comparator, Oracle, Reading
from shoal.rank.questions import Question, Ranker, Round, Rounds, Shares, Task
from shoal.rank.rankers import RANKERS, ranker_named
from shoal.rank.ranking import RankConfig, Ranked, Ranking, rank

__all__ = [
    "RANKERS",
    "Comparator",
    "Cost",
    "Forecast",
    "Oracle",
    "Question",
    "RankConfig",
    "Ranked",
    "Ranker",
    "Ranking",
    "Reading",
    "Round",
    "Rounds",
    "Run",
    "Shares",
    "Task",
    "plan",
    "rank",
    "ranker_named",
    "run",
]
