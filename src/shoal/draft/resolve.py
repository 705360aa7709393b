"""From a `Choice` to the proposer that does it, on one engine."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.depth.early_termination import EarlyTermination
from shoal.depth.plan import DepthPolicy
from shoal.depth.policies import policy_at
from shoal.draft.choices import Choice, NGram, SelfDraft, SmallModel, Suffix, Trigram
from shoal.draft.ngram import NGramProposer
from shoal.draft.shallow import ShallowProposer
from shoal.draft.small import SmallModelProposer
from shoal.draft.sources import LookupSource, ModelSource, Source
from shoal.draft.suffix import SuffixProposer
from shoal.draft.trees import ShallowTrees, SmallModelTrees
from shoal.draft.trigram import TrigramProposer
from shoal.engine.intake import resolve_plan
from shoal.errors import CheckpointError, InvalidDraft, InvalidPlan
from shoal.models.checkpoint import load_checkpoint, load_tokenizer
from shoal.models.directory import resolve
from shoal.models.executor import Executor, make_decoder
from shoal.models.memory import drop_freed

if TYPE_CHECKING:
    from shoal.engine.engine import Engine

SHALLOW = 0.25
"""Depth of a self-draft where nobody says another."""


def key_of(choice: Choice) -> Hashable:
    """Requests whose choices have the same key share a proposer: it does not depend on how many tokens they draft."""
    return type(choice), *(value for name, value in vars(choice).items() if name != "tokens")


def make_source(choice: Choice, engine: Engine) -> Source:
    """The proposer of a choice, nothing learnt of it yet. Raises `InvalidDraft` or `CheckpointError` where it cannot be had."""
    match choice:
        case NGram(match_tokens=match_tokens):
            return LookupSource(NGramProposer(match_tokens))
        case Suffix(scope=scope):
            return LookupSource(SuffixProposer(shared=scope is not None))
        case Trigram(corpus=corpus):
            return LookupSource(TrigramProposer(read_corpus(corpus, engine.tokenizer) if corpus else ()))
        case SelfDraft(plan=plan, branches=tuple() as branches):
            return ModelSource(ShallowTrees(engine.runner, plan or own_policy(engine), engine.tuned, branches))
        case SelfDraft(plan=plan, coupled=coupled):
            return ModelSource(
                ShallowProposer(engine.runner, plan or own_policy(engine), engine.tuned, coupled=coupled)
            )
        case SmallModel(path=path, branches=tuple() as branches):
            return ModelSource(SmallModelTrees(engine.runner, small_model(path, engine), branches))
        case SmallModel(path=path, coupled=coupled):
            return ModelSource(SmallModelProposer(engine.runner, small_model(path, engine), coupled=coupled))
    raise TypeError(f"{choice!r} has no proposer")


def own_policy(engine: Engine) -> DepthPolicy:
    """What the checkpoint was tuned with, as shallow as it was tuned for; the bottom layers of one that was not tuned."""
    tuned = engine.tuned
    if tuned is None or min(tuned.depths) == 1:
        num_layers = max(1, round(SHALLOW * engine.shape.num_layers))
        return EarlyTermination(min_layers=num_layers, max_layers=num_layers)
    return policy_at(tuned.policy, max(SHALLOW, min(tuned.depths)))


def check_choice(choice: Choice, engine: Engine, prompt_tokens: int, max_new_tokens: int) -> None:
    """Raises `InvalidDraft` where a self-draft's plan cannot be had for a request of these lengths."""
    if not isinstance(choice, SelfDraft) or choice.plan is None:
        return
    if hasattr(choice.plan, "route"):
        raise InvalidDraft(
            "a router decides from the prompt, which a self-draft does not wait for: give a plan or a policy"
        )
    try:
        resolve_plan(choice.plan, prompt_tokens, max_new_tokens, engine.shape.num_layers, engine.tuned)
    except InvalidPlan as error:
        raise InvalidDraft(f"the draft's plan: {error}") from error


def read_corpus(path: str, tokenizer: Any) -> list[list[int]]:
    """Token ids of a text file's lines."""
    if tokenizer is None:
        raise InvalidDraft("a tri-gram corpus is text and this engine has no tokenizer: leave corpus out")
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidDraft(f"the corpus {path} cannot be read: {error}") from error
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise InvalidDraft(f"the corpus {path} holds no text")
    return [list(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids]


def small_model(path: str, engine: Engine) -> Executor:
    """A smaller checkpoint, in the engine's dtype and on its device. Raises `InvalidDraft` where its tokens are others."""
    decoder = engine.runner.decoder
    dtype = "int8" if engine.shape.quantized else str(decoder.dtype).removeprefix("torch.")
    try:
        directory = resolve(path)
        tokenizer = None if engine.tokenizer is None else load_tokenizer(directory)
        config, weights = load_checkpoint(directory, dtype=dtype, device=str(decoder.device))
    except CheckpointError as error:
        raise InvalidDraft(f"the model to draft with: {error}") from error
    if tokenizer is not None and tokenizer.get_vocab() != engine.tokenizer.get_vocab():
        raise InvalidDraft(f"{path} cannot draft: its tokenizer is another one, so its tokens mean something else")
    if config.shape.vocab_size > engine.shape.vocab_size:
        raise InvalidDraft(
            f"{path} cannot draft: it has {config.shape.vocab_size} tokens, the model has {engine.shape.vocab_size}"
        )
    made = make_decoder(config, weights)
    del weights
    drop_freed()
    return made
