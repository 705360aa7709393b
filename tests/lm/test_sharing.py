"""What prompts of calls begin with is computed once, and answers are what they were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from shoal.engine.request import Generation
from shoal.engine.sampling import Sampling
from shoal.lm import ChatJob, Decoding, GenerateJob, LocalModel, Message, ScoreJob
from shoal.lm.sharing import Beginning, Tokens
from shoal.rank import rank

HEAD = "Which of the two passages is the better one? "
DOCS = [f"number {place} is a passage" for place in range(8)]


class Apart(LocalModel):
    """Every prompt is computed whole."""

    def run(
        self, prompts: Sequence[Tokens], samplings: Sequence[Sampling], note: Callable[[int, Generation], None]
    ) -> None:
        for done in self.engine.generate([list(prompt) for prompt in prompts], samplings, self.plan):
            note(done.index, done)


@pytest.fixture
def apart(local: LocalModel) -> LocalModel:
    return Apart(local.engine, name="apart")


@pytest.fixture
def sharing(directory: Path) -> LocalModel:
    return LocalModel.from_pretrained(directory, max_batch=4, cache_gib=0.2)


def test_what_is_shared() -> None:
    """The longest beginning, unless half of it is kept already."""
    calls = [
        (["a" * 20 + "x"], 0), (["a" * 20 + "y"], 20), (["a" * 20 + "yz"], 20), (["a" * 21, "a" * 22], 20),
        (["a" * 20 + "b" * 30, "a" * 20 + "b" * 30 + "c"], 49), (["q" * 40], 0), (["q" * 40 + "r", "q" * 30 + "s" * 10], 30),
        (["q" * 30, "t"], 0), (["q" * 10 + "t", "q" * 10 + "u"], 0),
    ]  # fmt: skip
    beginning = Beginning()
    for prompts, shared in calls:
        tokens = [tuple(map(ord, prompt)) for prompt in prompts]
        assert beginning.num_shared(tokens, min(map(len, tokens)) - 1) == shared, prompts


def test_answers_are_the_same(sharing: LocalModel, apart: LocalModel) -> None:
    """Scores of labels and of longer continuations, texts, chats; with how much of the prompts was spared."""
    scores = [ScoreJob(prompt=f"{HEAD}{doc}", continuations=(" A", " B")) for doc in DOCS]
    longer = [ScoreJob(prompt=f"{HEAD}{DOCS[0]}", continuations=(" the first one", " neither", " both"))]
    texts = [GenerateJob(prompt=f"{HEAD}{doc}", decoding=Decoding(max_new_tokens=5)) for doc in DOCS]
    for jobs, spared in ((scores, len(HEAD)), (longer, len(HEAD + DOCS[0]) - 1)):
        ours, theirs = sharing.score(jobs), apart.score(jobs)
        for one, other in zip(ours, theirs, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
            assert one.usage.prompt_tokens == other.usage.prompt_tokens
        ledgers = [one.usage.ledger for one in ours if one.usage.ledger]
        assert sum(ledger.shared_prompt_tokens for ledger in ledgers) > spared
    assert [one.text for one in sharing.generate(texts)] == [one.text for one in apart.generate(texts)]
    chats = [
        ChatJob(messages=(Message(role="user", content=HEAD + doc),), decoding=Decoding(max_new_tokens=3))
        for doc in DOCS
    ]
    assert [one.text for one in sharing.chat(chats)] == [one.text for one in apart.chat(chats)]
    sharing.engine.drop_prefixes()
    assert sharing.engine.runner.cache.blocks_in_use == 0


def test_rankings_are_the_same(sharing: LocalModel, apart: LocalModel) -> None:
    """A round of many questions, and rounds of one."""
    for ranker in ("all-pairs", "heapsort"):
        settings = {"k": 3, "budget": 20, "ranker": ranker, "max_passage_tokens": 30}
        ours = rank("short", DOCS, model=sharing, **settings)  # type: ignore[arg-type]
        theirs = rank("short", DOCS, model=apart, **settings)  # type: ignore[arg-type]
        assert ours.order == theirs.order
        one, other = ours.cost.usage.ledger, theirs.cost.usage.ledger
        assert one is not None
        assert other is not None
        assert one.prompt_layer_tokens + one.shared_layer_tokens == other.prompt_layer_tokens
        assert one.shared_layer_tokens > 0.2 * other.prompt_layer_tokens
