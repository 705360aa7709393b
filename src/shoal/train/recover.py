"""FiRST's second step: LoRA adapters that recover quality under the layers that a trained router leaves (arXiv 2410.12513)."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor, nn

from shoal.depth.first import FirstRouter
from shoal.errors import InvalidInput
from shoal.train.config import TuneConfig
from shoal.train.data import LengthGrouped, collate, prompt_columns, read_examples
from shoal.train.first import router_gate
from shoal.train.gates import gated_context
from shoal.train.start import add_lora, load
from shoal.train.state import newest_checkpoint, open_state, write_checkpoint
from shoal.train.trainer import Progress, arguments


class RoutedTrainer(transformers.Trainer):
    """A Trainer whose every step runs under the gates of `router`, which stays as it is."""

    def __init__(self, *args: Any, router: FirstRouter, sampler: LengthGrouped, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.router, self.sampler = router, sampler

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGrouped:
        return self.sampler

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward, both under the gates."""
        gate = router_gate(self.router, inputs, [])
        with gated_context(model, gate, prompt_columns=prompt_columns(inputs)):
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss


def recover(
    model: str,
    router: FirstRouter,
    data: Path,
    output: Path,
    config: TuneConfig,
    *,
    resume: bool = False,
    report: Callable[[int, int, float], None] = lambda step, num_steps, loss: None,
) -> None:
    """Tune LoRA adapters of the checkpoint `model` under `router`, merge them, and write both into the new checkpoint `output`.

    Of `config` what concerns depth plans and starts is not looked at, so it must be left as it is. Raises as `tune` does.
    """
    if config.lora_rank is None:
        raise InvalidInput("recovery trains LoRA adapters: give lora_rank")
    default = TuneConfig()
    for name in (
        "policy",
        "depths",
        "depth_sampling",
        "horizon",
        "warmup_layers",
        "from_scratch",
        "num_layers",
        "distill",
    ):
        if getattr(config, name) != getattr(default, name):
            raise InvalidInput(f"the router decides about layers: leave {name} out")
    if output.exists():
        raise InvalidInput(f"{output} exists already: choose another output or remove it")
    network, tokenizer = load(model)
    examples = read_examples(data, tokenizer, max_positions=network.config.max_position_embeddings)
    state = output.with_name(output.name + ".tuning")
    args = arguments(config, state)
    if args.process_index == 0:
        open_state(state, {"model": model, "data": str(data), "router": True, **asdict(config)}, resume=resume)
    use_cache = network.config.use_cache
    transformers.set_seed(config.seed)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    trainer = RoutedTrainer(
        model=add_lora(network, config.lora_rank),
        args=args,
        train_dataset=examples,
        data_collator=functools.partial(collate, pad_token_id=pad),
        callbacks=[Progress(report)],
        router=router,
        sampler=LengthGrouped(examples, batch_size=config.batch_size, seed=config.seed),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=newest_checkpoint(state) if resume else None)
    trained: Any = trainer.model
    trained = trained.merge_and_unload()
    trained.config.use_cache = use_cache  # the Trainer had switched it off
    if args.process_index == 0:
        write_checkpoint(output, trained, tokenizer, router)
        shutil.rmtree(state)
