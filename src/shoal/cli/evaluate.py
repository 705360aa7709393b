"""`shoal evaluate rank`: rankers on test collections."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from shoal.cli.options import names, option
from shoal.cli.progress import stages
from shoal.errors import InvalidInput
from shoal.files import check_writable

evaluate = typer.Typer(no_args_is_help=True, help="Measure parts of Shoal on test collections.")
DEFAULT = "adaptive,quicksort,heapsort,bubblesort,sliding,mohajer,mohajer-bubble,pac,tournament,bradley-terry,all-pairs"


@evaluate.callback()
def parts() -> None:
    """What stands before a part."""


@evaluate.command("rank")
def evaluate_rank(
    *,
    data: Annotated[Path, typer.Option(help="Directory of the collections' directories.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIRECTORY", help="A file per collection, and report.html.")
    ],
    collections: Annotated[
        str, typer.Option(help="dl19, dl20, scifact, cranfield, vaswani.", metavar="NAMES")
    ] = "dl19,dl20",
    rankers: Annotated[str, option("Ranking", "Separated by commas.", metavar="NAMES")] = DEFAULT,
    directions: Annotated[str, option("Ranking", "random, both, one.", metavar="NAMES")] = "random",
    budgets: Annotated[str, option("Ranking", "Model calls per query.", metavar="NUMBERS")] = "20,50,100,150,200",
    k: Annotated[int, option("Ranking", "Places that matter.", "--k", "-k")] = 10,
    oracle: Annotated[
        str | None, option("Oracle", "Simulated: perfect, published (the default), mismatched.", show_default=False)
    ] = None,
    model: Annotated[
        str | None, option("Oracle", "Instead: a checkpoint, hub id, or http://host:8000/v1#name.", "--model", "-m")
    ] = None,
    seeds: Annotated[
        int | None, option("Oracle", "Draws of a simulated oracle. Default: 5.", show_default=False)
    ] = None,
    batch: Annotated[int, option("Running", "Prompts that run together.")] = 32,
    limit: Annotated[int | None, option("Running", "First so many topics only.")] = None,
    jobs: Annotated[
        int | None, option("Running", "Processes, of a simulated oracle. Default: 1.", show_default=False)
    ] = None,
) -> None:
    """Measure rankers: NDCG@10, AP and reciprocal rank against model calls, with intervals and paired differences.

    shoal evaluate rank --data data --collections dl19,dl20 --out runs/rank

    shoal evaluate rank --data data --collections scifact --model models/qwen --rankers adaptive,quicksort -o runs/qwen
    """
    from dataclasses import replace

    from shoal.cli.rank import model_options
    from shoal.evaluate.ranking import ArmConfig, EvaluateConfig, evaluate_ranking
    from shoal.evaluate.ranking_data import DIRECTORIES, load_collection
    from shoal.evaluate.ranking_report import markdown, write_results
    from shoal.lm.cache import AnswerCache
    from shoal.lm.cached import CachedModel
    from shoal.lm.contract import LanguageModel
    from shoal.lm.resolve import load_model
    from shoal.rank.rankers import ranker_named
    from shoal.rank.simulate import NOISE_MODELS

    try:
        wanted = tuple(int(one) for one in names(budgets))
    except ValueError:
        raise InvalidInput(f"--budgets are whole numbers separated by commas, got {budgets!r}") from None
    simulated = {"--oracle": oracle, "--seeds": seeds, "--jobs": jobs}
    if model is not None and (given := [name for name, value in simulated.items() if value is not None]):
        raise InvalidInput(f"{', '.join(given)}: for simulated oracles only, and --model asks a real one")
    if oracle is not None and oracle not in NOISE_MODELS:
        raise InvalidInput(f"--oracle is one of {', '.join(NOISE_MODELS)}, got {oracle!r}")
    for option_name, value in (("--collections", collections), ("--rankers", rankers), ("--directions", directions)):
        if not names(value):
            raise InvalidInput(f"{option_name} are one or more names separated by commas, got {value!r}")
    arms = []
    for ranker in names(rankers):
        ranker_named(ranker)
        for direction in names(directions):
            if direction not in ("random", "both", "one"):
                raise InvalidInput(f"--directions are random, both or one, got {direction!r}")
            arms.append(ArmConfig(ranker=ranker, direction=direction))  # type: ignore[arg-type]
    config = EvaluateConfig(
        arms=tuple(arms), budgets=wanted, k=k, batch=batch, seeds=5 if seeds is None else seeds, noise=oracle or "published",
        jobs=1 if jobs is None else jobs,
    )  # fmt: skip
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput(f"--out {out} cannot be a directory ({error.strerror}): choose another") from None
    check_writable(out / "report.html")
    loaded = [load_collection(name, data / DIRECTORIES.get(name, name)) for name in names(collections)]
    if limit is not None:
        if limit < 1:
            raise InvalidInput(f"--limit must be 1 or more, got {limit}")
        loaded = [replace(one, topics=one.topics[:limit]) for one in loaded]
    asked: LanguageModel | None = None
    if model is not None:
        asked = CachedModel(load_model(model, **model_options(model, batch)), AnswerCache(out / "answers"))
    with stages(Console(stderr=True)) as show:
        results = [evaluate_ranking(one, config, model=asked, report=show) for one in loaded]
    path = write_results(results, out)
    for result in results:
        print(markdown(result), "\n")
    Console().print(f"{path}", highlight=False)
