"""FiRST's second step: LoRA adapters that recover quality under the layers that a trained router leaves (arXiv 2410.12513)."""

from __future__ import annotations

import functools
import shutil
import time
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
from shoal.train.gates import gated_context
from shoal.train.route import epoch, prompt_scores, shift, shifted_to
from shoal.train.start import add_lora, load
from shoal.train.state import newest_checkpoint, open_state, write_checkpoint
from shoal.train.trainer import Progress, arguments
from shoal.train.tune import TuneReport


class RoutedTrainer(transformers.Trainer):
    """A Trainer whose every step runs the layers that `router` picks, a mean share of `depth` of them in each batch."""

    def __init__(self, *args: Any, router: FirstRouter, depth: float, sampler: LengthGrouped, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.router, self.depth, self.sampler = router, depth, sampler

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGrouped:
        return self.sampler

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward, both under the gates."""
        inputs = self._prepare_inputs(inputs)
        runs = self.decide(model, inputs)
        with gated_context(model, lambda layer, states: runs[:, layer], prompt_columns=prompt_columns(inputs)):
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def decide(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """1 where a layer runs, else 0, [batch, L]: as the engine would decide with the adapters as they are now.

        Adapters change the states that the router reads, and a router shifted for other states soon runs twice its budget. So it is
        shifted anew for each batch. No gradient passes through the decision: with one, adapters learn to open the gates.
        """
        model.eval()
        scores = prompt_scores(self.router, model, inputs)
        model.train()
        runs = scores + shift(self.depth, self.router, scores) >= 0
        runs[:, list(self.router.kept_layers)] = True
        return runs.float().to(inputs["input_ids"].device)


def recover(
    model: str,
    router: FirstRouter,
    data: Path,
    output: Path,
    config: TuneConfig,
    *,
    depth: float,
    resume: bool = False,
    report: Callable[[int, int, float], None] = lambda step, num_steps, loss: None,
) -> TuneReport:
    """Tune LoRA adapters of the checkpoint `model` under `router`, merge them, and write both into the new checkpoint `output`.

    The router keeps its weights but for a shift: with the adapters, too, the prompts of `data` get a mean share of `depth` of the
    layers. Of `config` what concerns depth plans and starts is not looked at, so it must be left as it is. Raises as `tune` does.
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
        open_state(
            state, {"model": model, "data": str(data), "router": True, "depth": depth, **asdict(config)}, resume=resume
        )
    use_cache = network.config.use_cache
    transformers.set_seed(config.seed)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    progress = Progress(report)
    trainer = RoutedTrainer(
        model=add_lora(network, config.lora_rank),
        args=args,
        train_dataset=examples,
        data_collator=functools.partial(collate, pad_token_id=pad),
        callbacks=[progress],
        router=router,
        depth=depth,
        sampler=LengthGrouped(examples, batch_size=config.batch_size, seed=config.seed),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    began = time.perf_counter()
    trainer.train(resume_from_checkpoint=newest_checkpoint(state) if resume else None)
    seconds = time.perf_counter() - began
    trained: Any = trainer.model
    trained = trained.merge_and_unload()
    if args.process_index == 0:
        shifted = shifted_to(depth, router, trained.cpu().eval(), epoch(examples, pad, config))
        trained.config.use_cache = use_cache  # the Trainer had switched it off
        write_checkpoint(output, trained, tokenizer, shifted)
        shutil.rmtree(state)
    return TuneReport(
        output=output,
        num_examples=len(examples),
        steps=trainer.state.global_step,
        tokens=trainer.state.num_input_tokens_seen,
        final_loss=progress.loss,
        horizon=None,
        seconds=seconds,
    )
