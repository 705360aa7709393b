"""Depth-aware fine-tuning with transformers' Trainer: an ordinary checkpoint comes out, with `depth_plan.json` beside it."""

from __future__ import annotations

import functools
import json
import math
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn

from shoal.depth.checkpoint import TunedDepth, fit_horizon
from shoal.depth.plan import Dense, DepthPlan
from shoal.depth.skipdecode import SkipDecode
from shoal.errors import CheckpointError, InvalidInput, MissingExtra
from shoal.models.checkpoint import Checkpoint, load_tokenizer
from shoal.models.directory import resolve
from shoal.train.data import LengthGrouped, collate, prompt_columns, read_examples
from shoal.train.depth_context import decoder_layers, depth_context


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """How to tune. Two runs with the same config, data, model and machine give the same weights."""

    depths: tuple[float, ...] = (1.0, 1.0, 1 / 2, 1 / 3, 1 / 4, 1 / 5)
    """Depths to tune for, one drawn per batch; a depth named twice is drawn twice as often."""
    horizon: int | None = None
    """Clocks over which depth falls; None takes the median completion length of the data, in tokens."""
    warmup_layers: int = 1
    """Bottom layers that always run."""
    epochs: float = 1.0
    """Passes over the data; a fraction is fine."""
    learning_rate: float = 3e-4
    """Peak of AdamW's learning rate, which warms up over 3% of the steps and then falls along a cosine."""
    batch_size: int = 64
    """Examples per optimizer step."""
    accumulate: int = 1
    """Micro-batches that a batch is split into, to save memory."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    seed: int = 0
    """Seed of data order, plan order and dropout."""
    bfloat16: bool = False
    """Compute matrix products in bfloat16 (autocast); weights stay float32 during training."""
    gradient_checkpointing: bool = False
    """Trade time for memory: recompute layers in the backward pass."""
    lora_rank: int | None = None
    """Train LoRA adapters of this rank instead of all weights; they are merged into the checkpoint at the end."""
    save_every: int = 200
    """Optimizer steps between checkpoints."""

    def __post_init__(self) -> None:
        if not self.depths:
            raise InvalidInput("depths must name at least one depth, such as 1 or 0.5")
        for name in ("epochs", "learning_rate", "batch_size", "accumulate", "save_every"):
            if getattr(self, name) <= 0:
                raise InvalidInput(f"{name} must be above 0, got {getattr(self, name)}")
        if self.batch_size % self.accumulate:
            raise InvalidInput(f"batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}")
        if self.horizon is not None and self.horizon < 1:
            raise InvalidInput(f"horizon must be 1 or more tokens, got {self.horizon}")
        if self.warmup_layers < 0:
            raise InvalidInput(f"warmup_layers must be 0 or more, got {self.warmup_layers}")
        if self.lora_rank is not None and self.lora_rank < 1:
            raise InvalidInput(f"lora_rank must be 1 or more, got {self.lora_rank}")


@dataclass(frozen=True, kw_only=True)
class TuneReport:
    """What a run did."""

    output: Path
    """The checkpoint."""
    num_examples: int
    """Examples in the data."""
    steps: int
    """Optimizer steps, those before a resume included."""
    final_loss: float
    """Mean training loss per completion token since the last log line, or over the run where it was shorter."""
    horizon: int
    """Horizon that was used."""
    seconds: float
    """Wall time of training in this process (after a resume: of the rest only)."""


def plans_for(depths: Sequence[float], num_layers: int, *, horizon: int, warmup_layers: int) -> list[DepthPlan]:
    """The plan of each depth; 1 is dense. Raises `InvalidPlan` with the allowed range."""
    return [
        Dense().plan(num_layers)
        if depth == 1
        else SkipDecode(depth=depth, horizon=horizon, warmup_layers=warmup_layers).plan(num_layers)
        for depth in depths
    ]


def plan_at(plans: Sequence[DepthPlan], batch: int, *, seed: int) -> DepthPlan:
    """The plan of the batch with this number: each run of `len(plans)` batches uses every plan once, in a shuffled order.

    A function of its arguments alone, so a run that resumes (or another process of the same run) draws the same.
    """
    cycle, index = divmod(batch, len(plans))
    order = list(plans)
    random.Random(f"{seed}/{cycle}").shuffle(order)
    return order[index]


class DepthTrainer(transformers.Trainer):
    """A Trainer whose every training step runs under one of `plans`.

    Expects batches made by `shoal.train.data.collate`.
    """

    def __init__(self, *args: Any, plans: Sequence[DepthPlan], sampler: LengthGrouped, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plans = plans
        self.sampler = sampler

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGrouped:
        return self.sampler

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward, both within the depth context."""
        plan = plan_at(self.plans, self.state.global_step, seed=self.args.seed)
        with depth_context(model, plan, prompt_columns=prompt_columns(inputs)):
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss


class Progress(transformers.TrainerCallback):
    """Calls `report(step, num_steps, loss)` whenever the Trainer logs a loss."""

    def __init__(self, report: Callable[[int, int, float], None]) -> None:
        self.report = report
        self.loss = float("nan")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Pass the mean loss since the last log line on; the last line of all has the mean over the run instead."""
        if logs and "loss" in logs:
            self.loss = logs["loss"]
            if state.is_world_process_zero:
                self.report(state.global_step, state.max_steps, self.loss)
        elif logs and "train_loss" in logs and math.isnan(self.loss):
            self.loss = logs["train_loss"]


def tune(
    model: str,
    data: Path,
    output: Path,
    config: TuneConfig,
    *,
    resume: bool = False,
    report: Callable[[int, int, float], None] = lambda step, num_steps, loss: None,
) -> TuneReport:
    """Fine-tune the checkpoint `model` (directory or hub id) on the JSONL file `data` and write the checkpoint `output`.

    `output` appears at the end, whole: config, safetensors weights, tokenizer and `depth_plan.json`. Until then the state of the
    run is in `<output>.tuning`, from which `resume=True` goes on after an interruption, with the same result as without one.
    Raises `InvalidInput` (bad data, existing output), `InvalidPlan` (a depth that the model does not allow), `MissingExtra`.
    """
    for package in ("accelerate", "peft") if config.lora_rank else ("accelerate",):
        if find_spec(package) is None:
            raise MissingExtra(f"tuning needs {package}: pip install 'shoal[train]'")
    if output.exists():
        raise InvalidInput(f"{output} exists already: choose another output or remove it")
    network, tokenizer = load(model)
    examples = read_examples(data, tokenizer, max_positions=network.config.max_position_embeddings)
    horizon = fit_horizon(len(e.completion) for e in examples) if config.horizon is None else config.horizon
    tuned = TunedDepth(
        horizon=horizon, warmup_layers=config.warmup_layers, depths=tuple(sorted(set(config.depths), reverse=True))
    )
    plans = plans_for(config.depths, len(decoder_layers(network)), horizon=horizon, warmup_layers=config.warmup_layers)
    state = output.with_name(output.name + ".tuning")
    args = arguments(config, state)
    # The Trainer would copy the network to each GPU in every step; a copy does not have the `forward`s of the depth context.
    if args.n_gpu > 1:
        raise InvalidInput(
            f"one process cannot tune on {args.n_gpu} GPUs: run `accelerate launch -m shoal.cli.main tune ...`, a process per "
            "GPU, or choose one with CUDA_VISIBLE_DEVICES=0"
        )
    if args.process_index == 0:
        open_state(state, {"model": model, "data": str(data), **asdict(config)}, resume=resume)

    use_cache = network.config.use_cache
    transformers.set_seed(config.seed)
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
        plans=plans,
        sampler=LengthGrouped(examples, batch_size=config.batch_size, seed=config.seed),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=newest_checkpoint(state) if resume else None)
    seconds = time.perf_counter() - start

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
        final_loss=progress.loss,
        horizon=horizon,
        seconds=seconds,
    )


def load(model: str) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """The causal language model (float32) and tokenizer of a directory or hub id. Raises `CheckpointError`.

    What the engine could not run afterwards is refused, pickles among it; no code that comes with a checkpoint runs.
    """
    directory = resolve(model)
    Checkpoint.open(directory).check()
    try:
        network = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"cannot load {model}: {error}") from error
    return network, load_tokenizer(directory)


def add_lora(network: nn.Module, rank: int) -> Any:
    """`network` with trainable LoRA adapters of `rank` on all linear layers but the head, everything else frozen."""
    import peft

    return peft.get_peft_model(
        network,
        peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def arguments(config: TuneConfig, state: Path) -> transformers.TrainingArguments:
    """The Trainer's settings for `config`; a batch is divided among the processes that `accelerate launch` started."""
    parts = config.accumulate * int(os.environ.get("WORLD_SIZE", "1"))
    if config.batch_size % parts:
        raise InvalidInput(f"batch_size {config.batch_size} must be a multiple of accumulate x processes = {parts}")
    # transformers is renaming this argument; the old name warns, the new one is missing from earlier releases.
    names = transformers.TrainingArguments.__dataclass_fields__
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    return transformers.TrainingArguments(
        output_dir=str(state),
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        weight_decay=config.weight_decay,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        per_device_train_batch_size=config.batch_size // parts,
        gradient_accumulation_steps=config.accumulate,
        bf16=config.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=True,  # those of layers that a plan skips
        seed=config.seed,
        save_steps=config.save_every,
        save_total_limit=2,
        logging_steps=20,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        **{checkpointing: config.gradient_checkpointing},  # type: ignore[arg-type]
    )


def open_state(state: Path, settings: dict[str, Any], *, resume: bool) -> None:
    """Make the directory `state` of a run with `settings`; with `resume`, check that it is the directory of such a run."""
    record = state / "settings.json"
    settings = json.loads(json.dumps(settings))
    if resume:
        if not record.is_file():
            raise InvalidInput(f"nothing to resume: {state} holds no run")
        before = json.loads(record.read_text(encoding="utf-8"))
        changed = [name for name in settings if settings[name] != before.get(name)]
        if changed:
            name = changed[0]
            raise InvalidInput(
                f"cannot resume with another {name}: {before.get(name)!r} before, {settings[name]!r} now"
            )
    elif state.exists():
        raise InvalidInput(f"{state} holds an interrupted run: resume it, or remove that directory")
    else:
        state.mkdir(parents=True)
        record.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def newest_checkpoint(state: Path) -> str | None:
    """The newest whole checkpoint of an interrupted run; the Trainer writes `trainer_state.json` last."""
    whole = [p.parent for p in state.glob("checkpoint-*/trainer_state.json") if p.stat().st_size]
    return str(max(whole, key=lambda p: int(p.name.split("-")[1]))) if whole else None


def write_checkpoint(
    output: Path, network: Any, tokenizer: transformers.PreTrainedTokenizerBase, tuned: TunedDepth
) -> None:
    """Write an ordinary Hugging Face checkpoint with `depth_plan.json`; `output` appears whole or not at all."""
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        network.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        tuned.save(partial)
        partial.chmod(0o755)  # mkdtemp makes it private
        os.replace(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
