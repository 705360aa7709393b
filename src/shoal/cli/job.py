"""Running a list of prompts to the end, with a progress bar, and adding up what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from shoal.cli.prompts import PromptLine
from shoal.depth.plan import Dense, DepthPolicy
from shoal.engine.engine import Engine
from shoal.engine.request import Generation
from shoal.engine.run_cost import RunCost
from shoal.engine.sampling import Sampling
from shoal.errors import InvalidDraft, InvalidPlan, RequestFailed, ShoalError


def run_prompts(
    engine: Engine,
    prompts: Sequence[PromptLine],
    sampling: Sampling,
    policy: DepthPolicy,
    *,
    first: int = 0,
    timeout_s: float | None = None,
    draft: object = None,
    probes: Sequence[Path] = (),
    on_finish: Callable[[Generation], None] | None = None,
    console: Console,
    label: str,
) -> RunCost:
    """Complete `prompts[first:]`; `on_finish` gets each completion as it ends, in any order.

    Prompt i has the seed `sampling.seed + i`: with one seed for all, equal prompts would have equal completions.
    All prompts are checked before anything runs: raises the engine's error with the prompt's line number.
    """
    observer = engine.observer(list(probes))
    refused: list[tuple[int, ShoalError]] = []
    for index, line in enumerate(prompts[first:], start=first):
        its_own = replace(sampling, seed=(sampling.seed + index) % 2**64)
        try:
            engine.add(
                line.prompt,
                its_own,
                policy,
                draft=draft,
                probes=observer,
                index=index,
                timeout_s=timeout_s,
                streaming=False,
            )
        except (InvalidPlan, InvalidDraft):
            raise
        except ShoalError as error:
            refused.append((line.line, error))
    if refused:
        number, refusal = refused[0]
        more = f" (prompts refused besides: {len(refused) - 1})" if len(refused) > 1 else ""
        raise type(refusal)(f"line {number}: {refusal}{more}") from refusal
    run = RunCost()
    engine.stats.reset()
    new_tokens, began = 0, time.perf_counter()
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens_per_s]:.0f} tokens/s"),
        TextColumn("{task.fields[mean_layers]:.1f} of " + f"{engine.shape.num_layers} layers"),
        TimeRemainingColumn(),
    ]
    total = (len(prompts) - first) * sampling.n
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(label, total=total, tokens_per_s=0.0, mean_layers=float(engine.shape.num_layers))
        while run.num_requests < total:
            for chunk in engine.step():
                new_tokens += len(chunk.token_ids)
                if chunk.generation is not None:
                    run.add(chunk.generation)
                    if on_finish is not None:
                        on_finish(chunk.generation)
            progress.update(
                task,
                completed=run.num_requests,
                tokens_per_s=new_tokens / (time.perf_counter() - began),
                mean_layers=run.ledger.mean_layers or engine.shape.num_layers,
            )
    run.stats = replace(engine.stats)
    return run


def complete(
    engine: Engine, prompts: Sequence[PromptLine], sampling: Sampling, *, console: Console, label: str
) -> list[Generation]:
    """All completions at full depth, in the order of the prompts. Raises `RequestFailed`, with the line, where one fails."""
    done: dict[int, Generation] = {}

    def note(generation: Generation) -> None:
        done[generation.index] = generation

    run_prompts(engine, prompts, sampling, Dense(), on_finish=note, console=console, label=label)
    for index, line in enumerate(prompts):
        if done[index].error is not None:
            raise RequestFailed(f"line {line.line}: {done[index].error}")
    return [done[index] for index in range(len(prompts))]
