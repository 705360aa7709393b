"""A checkpoint that runs here, in an engine of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from shoal.depth.plan import Dense
from shoal.engine.engine import Engine
from shoal.engine.intake import Plan
from shoal.engine.request import Generation
from shoal.engine.sampling import Sampling
from shoal.errors import LanguageModelError
from shoal.lm.engine_model import EngineModel
from shoal.lm.sharing import Beginning, Tokens


class LocalModel(EngineModel):
    """A model in this process."""

    def __init__(self, engine: Engine, *, name: str, plan: Plan | None = None) -> None:
        """
        Args:
            engine: it needs a tokenizer.
            name: of the checkpoint and its precision; the plan is added to it.
            plan: depth of generated tokens; scores read prompts only, and a plan without `prompt_layers` does not change them.
        """
        self.plan = Dense() if plan is None else plan
        self.beginning = Beginning()
        super().__init__(engine, name=name if isinstance(self.plan, Dense) else f"{name} {self.plan}")

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], *, plan: Plan | None = None, **options: Any) -> LocalModel:
        """Load a checkpoint; `options` are those of `Engine.from_pretrained`."""
        engine = Engine.from_pretrained(path, **options)
        name = f"{os.fspath(path)} {engine.config.fingerprint[:12]} {options.get('dtype', 'auto')}"
        return cls(engine, name=name, plan=plan)

    def run(
        self, prompts: Sequence[Tokens], samplings: Sequence[Sampling], note: Callable[[int, Generation], None]
    ) -> None:
        """As in `EngineModel`; raises `LanguageModelError` once the others have ended."""
        if not prompts:
            return
        most = min(len(one) - 1 - (how.prompt_logprobs_last or 0) for one, how in zip(prompts, samplings, strict=True))
        shared = self.beginning.num_shared(prompts, most)
        failed: str | None = None
        for chunk in self.engine.stream(
            [list(prompt) for prompt in prompts], samplings, self.plan, shared_tokens=shared
        ):
            done = chunk.generation
            if done is None:
                continue
            if done.error is None:
                note(chunk.index, done)
            else:
                failed = failed or done.error
        if failed is not None:
            raise LanguageModelError(f"{self.name}: {failed}")
