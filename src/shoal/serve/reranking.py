"""`/v1/rerank`: documents in a better order, under a budget of model calls, in the form of Cohere's and Jina's APIs.

A ranker computes between its rounds, and the event loop waits for nobody: so each ranking has a thread, whose questions reach the
model's thread through the worker, a batch at a time.

    ranking's thread   round ─▶ requests ─▶ │ event loop: submit, follow │ ─▶ generations ─▶ answers ─▶ next round
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from shoal.engine.intake import resolve_plan
from shoal.engine.ledger import Ledger
from shoal.engine.request import Generation, Request
from shoal.engine.sampling import Sampling
from shoal.errors import InvalidInput
from shoal.lm.engine_model import EngineModel
from shoal.lm.sharing import Tokens
from shoal.rank.prompted import LABEL_TOKENS
from shoal.rank.ranking import RankConfig, Ranking, check_documents, rank_with
from shoal.serve import schema
from shoal.serve.errors import ApiError, invalid
from shoal.serve.intake import Intake
from shoal.serve.plans import asked
from shoal.serve.replies import failure, spent
from shoal.serve.worker import Worker

DEFAULT_PLACES = 10
"""Places that matter where a body does not say how many it wants."""


class ServedModel(EngineModel):
    """The served model as one ranking asks it, from a thread of its own."""

    def __init__(self, intake: Intake, worker: Worker, body: schema.Rerank, key: str) -> None:
        """Made in the event loop. `key`: the name of whoever asks."""
        super().__init__(intake.engine, name=intake.config.model)
        self.intake, self.worker, self.body, self.key = intake, worker, body, key
        self.ends_at = time.monotonic() + min(intake.config.timeout_s, body.timeout_s or intake.config.timeout_s)
        self.is_over = False
        self._begun = False
        self._asking: asyncio.Task[Any] | None = None
        self._loop = asyncio.get_running_loop()

    def run(
        self, prompts: Sequence[Tokens], samplings: Sequence[Sampling], note: Callable[[int, Generation], None]
    ) -> None:
        """As in `EngineModel`, a batch at a time, so that others come in between. Raises `ApiError`."""
        for begin in range(0, len(prompts), self.batch):
            requests: list[Request] = []
            for place in range(begin, min(begin + self.batch, len(prompts))):
                requests += self._prepare(prompts[place], samplings[place], place)
            for done in asyncio.run_coroutine_threadsafe(self._ask(requests), self._loop).result():
                if done.finish_reason == "timeout":
                    message = "out of time: give the ranking more of it, or a smaller budget"
                    raise ApiError(504, message, code="timeout")
                if (error := failure(done)) is not None:
                    raise error
                note(done.index, done)

    def close(self) -> None:
        """Nobody waits for the ranking any more: what it asks now is cancelled, and it asks nothing more. In the event loop."""
        self.is_over = True
        if self._asking is not None:
            self._asking.cancel()

    def _prepare(self, prompt: Tokens, sampling: Sampling, place: int) -> list[Request]:
        """A question's request, which has the seconds that are left to the ranking."""
        left_s = max(0.0, self.ends_at - time.monotonic())
        try:
            return self.intake.prepare(prompt, sampling, self.body, index=place, draft=None, timeout_s=left_s)
        except ApiError as error:
            if error.param not in schema.Depth.model_fields:  # it is of a prompt that nobody but we wrote
                error.param = "documents"
            raise

    async def _ask(self, requests: Sequence[Request]) -> list[Generation]:
        """Results of requests. A ranking that was let in is not refused when the queue is full later."""
        if self.is_over:
            raise ApiError(499, "nobody waits for this ranking")
        follower = self.worker.submit(requests, self.key, admitted=self._begun)
        self._begun, self._asking = True, asyncio.current_task()
        try:
            return await follower.generations()
        finally:
            self._asking = None
            follower.close()


def rank_config(intake: Intake, body: schema.Rerank) -> RankConfig:
    """How to rank what a body asks for, within the operator's limits. Raises `ApiError`."""
    intake.check_model(body.model)
    most = intake.config.max_documents
    if len(body.documents) > most:
        raise ApiError(400, f"documents: {len(body.documents)}, this server ranks at most {most}", param="documents")
    if body.budget is not None and body.budget > intake.config.max_rank_calls:
        most = intake.config.max_rank_calls
        raise ApiError(400, f"budget can be at most {most} here, got {body.budget}", param="budget")
    if not body.query.strip():
        raise ApiError(400, "query: it is empty", param="query")
    try:
        check_documents(body.query, body.texts)
    except InvalidInput as error:
        raise invalid(error, "documents") from error
    check_depth(intake, body)
    try:
        config = RankConfig(
            k=body.top_n or DEFAULT_PLACES,
            budget=min(RankConfig().budget or 1, intake.config.max_rank_calls) if body.budget is None else body.budget,
            ranker=body.ranker,
            direction=body.direction,
            mode=body.mode,
            max_passage_tokens=body.max_tokens_per_doc,
            seed=body.seed,
        )
        config.make()
    except InvalidInput as error:  # of what it says, the schema leaves only the ranker's name open
        raise invalid(error, "ranker") from error
    return config


def check_depth(intake: Intake, body: schema.Rerank) -> None:
    """Refuse a plan that is none, and one that would change nothing: scores are read from the prompt's pass."""
    field = asked(body)
    if field is None:
        return
    num_layers, tuned = intake.engine.shape.num_layers, intake.engine.tuned
    try:
        plan = resolve_plan(intake.plan(body), 1, LABEL_TOKENS, num_layers, tuned)
    except InvalidInput as error:
        raise invalid(error, field) from error
    if body.mode == "score" and all(plan.runs_prompt):
        message = (
            f"{field}: it acts on generated tokens, and mode 'score' reads the prompt only: "
            "ask for mode 'generate', or give a plan with prompt_layers"
        )
        raise ApiError(400, message, param=field)


def rerank(model: ServedModel, config: RankConfig) -> dict[str, Any]:
    """The answer to a body. Runs in the ranking's thread; raises `ApiError`."""
    began = time.monotonic()
    try:
        ranking = rank_with(model, config, model.body.query, model.body.texts)
    except InvalidInput as error:
        raise invalid(error, "documents") from error
    seconds = round(time.monotonic() - began, 4)
    return answer(ranking, model.body, num_layers=model.engine.shape.num_layers, seconds=seconds)


def answer(ranking: Ranking, body: schema.Rerank, *, num_layers: int, seconds: float) -> dict[str, Any]:
    """A ranking in Cohere's and Jina's form."""
    n, cost = len(body.documents), ranking.cost
    results = [
        {"index": one.index, "relevance_score": place_score(one.place, n)}
        | ({"document": {"text": one.text}} if body.return_documents else {})
        for one in ranking.documents[: body.top_n]
    ]
    shoal = spent(cost.usage.ledger or Ledger(), num_layers, None) | {
        "calls": cost.calls,
        "rounds": cost.rounds,
        "tokens": cost.tokens,
        "questions": cost.questions,
        "reused": cost.reused,
        "unparsed": cost.unparsed,
        "finished": ranking.finished,
        "cut_documents": ranking.cut_documents,
        "cut_query": ranking.cut_query,
        "seconds": seconds,
    }
    return {
        "id": f"rerank-{secrets.token_hex(12)}",
        "model": body.model,
        "results": results,
        "usage": {"total_tokens": cost.tokens, "shoal": shoal},
    }


def place_score(place: int, n: int) -> float:
    """Share of the other documents that stand behind: it says the order, and nothing of how relevant a document is.

    >>> [place_score(place, 5) for place in range(1, 6)]
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    return (n - place) / (n - 1) if n > 1 else 1.0
