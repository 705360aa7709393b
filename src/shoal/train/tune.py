"""Depth-aware fine-tuning with transformers' Trainer: an ordinary checkpoint comes out, with `depth_plan.json` beside it."""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers

from shoal.depth.checkpoint import TunedDepth, fit_horizon
from shoal.errors import InvalidInput, MissingExtra
from shoal.train.config import TuneConfig
from shoal.train.data import LengthGrouped, collate, read_examples
from shoal.train.depth_context import decoder_layers
from shoal.train.depths import plans_for
from shoal.train.distill import make_teacher, other_teacher
from shoal.train.start import add_lora, from_scratch, load
from shoal.train.state import newest_checkpoint, open_state, write_checkpoint
from shoal.train.trainer import DepthTrainer, Progress, arguments


@dataclass(frozen=True, kw_only=True)
class TuneReport:
    """What a run did."""

    output: Path
    """The checkpoint."""
    num_examples: int
    """Examples in the data."""
    steps: int
    """Optimizer steps, those before a resume included."""
    tokens: int
    """Prompt and completion tokens that were read in them, padding left out: equal for runs with equal data, seed and batches."""
    final_loss: float
    """Mean training loss per completion token since the last log line, or over the run where it was shorter."""
    horizon: int | None
    """Horizon that was used; None where a router decides."""
    seconds: float
    """Wall time of training in this process (after a resume: of the rest only)."""


def tune(
    model: str,
    data: Path,
    output: Path,
    config: TuneConfig,
    *,
    resume: bool = False,
    report: Callable[[int, int, float], None] = lambda step, num_steps, loss: None,
) -> TuneReport:
    """Train the checkpoint `model` (directory or hub id) on the JSONL file `data` and write the checkpoint `output`.

    `output` appears at the end, whole: config, safetensors weights, tokenizer and `depth_plan.json`. Until then the state of the
    run is in `<output>.tuning`, from which `resume=True` goes on after an interruption, with the same result as without one.
    Raises `InvalidInput` (bad data, existing output), `InvalidPlan` (a depth that the model does not allow), `MissingExtra`, and
    `TuningDiverged` where the loss is not finite; the last good state stays.
    """
    for package in ("accelerate", "peft") if config.lora_rank else ("accelerate",):
        if find_spec(package) is None:
            raise MissingExtra(f"tuning needs {package}: pip install 'shoal[train]'")
    if output.exists():
        raise InvalidInput(f"{output} exists already: choose another output or remove it")
    if config.from_scratch:
        network, tokenizer = from_scratch(model, num_layers=config.num_layers, seed=config.seed)
    else:
        network, tokenizer = load(model)
    examples = read_examples(data, tokenizer, max_positions=network.config.max_position_embeddings)
    tuned = TunedDepth(
        policy=config.policy,
        horizon=config.horizon or fit_horizon(len(e.completion) for e in examples),
        warmup_layers=config.warmup_layers,
        depths=tuple(sorted(set(config.depths), reverse=True)),
    )
    plans = plans_for(
        config.policy, config.depths, len(decoder_layers(network)),
        horizon=tuned.horizon, warmup_layers=tuned.warmup_layers,
    )  # fmt: skip
    state = output.with_name(output.name + ".tuning")
    args = arguments(config, state)
    if args.process_index == 0:
        open_state(state, {"model": model, "data": str(data), **asdict(config)}, resume=resume)

    use_cache = network.config.use_cache
    transformers.set_seed(config.seed)
    teacher = None
    if config.distill:
        taught_by = network if config.teacher is None else other_teacher(config.teacher, network, tokenizer)
        teacher = make_teacher(taught_by, args.device)
    if config.lora_rank:
        network = add_lora(network, config.lora_rank)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    progress = Progress(report)
    trainer = DepthTrainer(
        model=network,
        args=args,
        train_dataset=examples,
        data_collator=functools.partial(collate, pad_token_id=pad),
        callbacks=[progress],
        config=config,
        plans=plans,
        sampler=LengthGrouped(examples, batch_size=config.batch_size, seed=config.seed),
        teacher=teacher,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    began = time.perf_counter()
    trainer.train(resume_from_checkpoint=newest_checkpoint(state) if resume else None)
    seconds = time.perf_counter() - began

    trained: Any = trainer.model
    if config.lora_rank:
        trained = trained.merge_and_unload()
    trained.config.use_cache = use_cache  # the Trainer had switched it off
    if args.process_index == 0:
        write_checkpoint(output, trained, tokenizer, tuned)
        shutil.rmtree(state)
    return TuneReport(
        output=output,
        num_examples=len(examples),
        steps=trainer.state.global_step,
        tokens=trainer.state.num_input_tokens_seen,
        final_loss=progress.loss,
        horizon=tuned.horizon,
        seconds=seconds,
    )
