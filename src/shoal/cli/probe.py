"""`shoal probe`: classifiers of prompts that read the states of the pass which answers them."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from shoal.cli import options
from shoal.cli.options import option
from shoal.cli.progress import stages
from shoal.errors import InvalidInput
from shoal.files import check_writable, write_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shoal.engine.engine import Engine
    from shoal.signals.quality import Quality

app = typer.Typer(
    no_args_is_help=True, help="Classify prompts from the pass that answers them: fit, eval, show, export."
)

ProbeFile = Annotated[Path, typer.Argument(metavar="PROBE", help="A file of `shoal probe fit`.")]
MaxTokens = Annotated[
    int,
    option(
        "Extraction",
        "What is extracted is cut to so many tokens of a prompt; the result says of how many prompts. "
        "The probe itself reads prompts whole.",
        min=1,
    ),
]
CacheGib = Annotated[float, option("Extraction", "Most that extracted states may take on the disk.")]
States = Annotated[
    Path | None,
    option(
        "Extraction",
        "Directory for extracted states, kept for the next run. Default: one that goes when the command is done, and is "
        "taken up again where it was interrupted.",
        metavar="DIRECTORY",
    ),
]
Device = Annotated[str, option("Model", "cpu, cuda or cuda:1.")]


@app.command()
def fit(
    model: options.Model,
    data: Annotated[Path, typer.Option(help="JSONL, each line with 'prompt' (or 'text') and 'label'.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Where the probe goes, a safetensors file.")],
    name: Annotated[str | None, typer.Option(help="Its name in results. Default: that of the file.")] = None,
    operator: Annotated[
        Literal["pool", "gate", "attention"],
        typer.Option(
            help="From cheap to strong; attention keeps a row per token, so it has a longest prompt, --max-tokens."
        ),
    ] = "gate",
    positive: Annotated[
        str | None, typer.Option(help="Of two labels, the one to find. Default: the rarer one.")
    ] = None,
    learning_rates: Annotated[str, option("Training", "Tried one by one, separated by commas.")] = "1e-4,1e-3,1e-2",
    epochs: Annotated[int, option("Training", "Most passes over DATA; training stops early.")] = 10,
    batch_size: Annotated[int, option("Training", "Prompts per step.")] = 32,
    weight_decay: Annotated[float, option("Training", "AdamW's.")] = 0.01,
    factor: Annotated[
        int | None, option("Training", "attention: width of the states over the width inside. Default: 32.")
    ] = None,
    gate_scale: Annotated[
        float | None,
        option("Training", "gate: what tanh is multiplied by; 1, the default, as published, more is sharper."),
    ] = None,
    levels: Annotated[int | None, option("Training", "Levels to read, from the bottom. Default: all.", min=1)] = None,
    seed: Annotated[int, option("Training", "Of the split, the order and random weights.")] = 0,
    max_tokens: MaxTokens = 256,
    cache_gib: CacheGib = 4.0,
    states: States = None,
    dtype: options.Dtype = "auto",
    device: Device = "cpu",
    revision: options.Revision = None,
    token: options.Token = None,
) -> None:
    """Train a probe on labelled prompts; the model stays as it is.

    shoal probe fit Qwen/Qwen3-0.6B --data toxic.jsonl -o toxicity.safetensors

    shoal generate Qwen/Qwen3-0.6B prompts.jsonl -o out.jsonl --probe toxicity.safetensors
    """
    from shoal.signals.fit import FitConfig
    from shoal.signals.labelled import read_labelled
    from shoal.signals.report import fit_report

    check_writable(out)
    labelled = read_labelled(data)
    try:
        rates = tuple(float(rate) for rate in options.names(learning_rates))
    except ValueError:
        raise InvalidInput(f"--learning-rates are numbers separated by commas, got {learning_rates!r}") from None
    if factor is not None and operator != "attention":
        raise InvalidInput(f"--factor is for --operator attention, this is {operator}")
    if gate_scale is not None and operator != "gate":
        raise InvalidInput(f"--gate-scale is for --operator gate, this is {operator}")
    config = FitConfig(
        operator=operator, learning_rates=rates, epochs=epochs, batch_size=batch_size, weight_decay=weight_decay,
        factor=32 if factor is None else factor, gate_scale=1.0 if gate_scale is None else gate_scale, num_levels=levels, seed=seed,
    )  # fmt: skip
    errors, console = plain(stderr=True), plain()
    counts = Counter(one.label for one in labelled).most_common()
    errors.print(", ".join(f"{count} {label!r}" for label, count in counts))
    with stages(errors) as show, states_in(states, out.with_name(f"{out.stem}.states")) as directory:
        engine = load(model, dtype=dtype, device=device, revision=revision, token=token)
        found = fit_report(
            engine,
            labelled,
            directory,
            out,
            name=out.stem if name is None else name,
            positive=positive,
            max_tokens=max_tokens,
            budget_gib=cache_gib,
            replace=states is None,
            config=config,
            report=show,
        )
    probe, ours = found.fitted.probe, found.fitted.probe.settings
    console.print(quality_table({f"{ours.operator} probe": found.fitted.validation, **found.baselines}))
    console.print(
        f"\nOn {found.fitted.validation.num_prompts} prompts that were held out of {len(labelled)}; chosen: "
        f"{', '.join(f'{key} {value}' for key, value in found.fitted.chosen.settings.items())}, of {len(found.fitted.trials)}.",
        style="dim",
    )  # fmt: skip
    if found.num_truncated:
        console.print(f"{found.num_truncated} prompts were cut to {max_tokens} tokens.", style="yellow")
    console.print(f"{out}: {probe.num_parameters:,} parameters, version {probe.version}", soft_wrap=True)


@app.command("eval")
def evaluate(
    model: options.Model,
    probe: ProbeFile,
    data: Annotated[Path, typer.Option(help="JSONL, each line with 'prompt' (or 'text') and 'label'.")],
    train: Annotated[
        Path | None, typer.Option(help="JSONL to train the baselines on: MULI (first-token logits) and a bag of words.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Picture of calibration and levels, PNG or SVG.")
    ] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="File for all numbers.")] = None,
    max_tokens: MaxTokens = 256,
    cache_gib: CacheGib = 4.0,
    states: States = None,
    dtype: options.Dtype = "auto",
    device: Device = "cpu",
    revision: options.Revision = None,
    token: options.Token = None,
) -> None:
    """Try a probe on labelled prompts, as the pass that answers them reads them.

    shoal probe eval Qwen/Qwen3-0.6B toxicity.safetensors --data test.jsonl --train toxic.jsonl --out toxicity.png
    """
    from shoal.signals.figure import check_picture, draw
    from shoal.signals.labelled import read_labelled
    from shoal.signals.probe import Probe
    from shoal.signals.report import evaluate as evaluating

    for path in filter(None, (out, json_)):
        check_writable(path)
    if out is not None:
        check_picture(out)
    labelled, known = read_labelled(data), read_labelled(train) if train else []
    loaded = Probe.load(probe)
    with stages(plain(stderr=True)) as show, states_in(states, None) as directory:
        engine = load(model, dtype=dtype, device=device, revision=revision, token=token)
        found = evaluating(
            engine, loaded, labelled, directory, train=known, levels=bool(out or json_), max_tokens=max_tokens,
            budget_gib=cache_gib, report=show,
        )  # fmt: skip
    if json_ is not None:
        write_json(json_, {**found.to_dict(), "data": str(data)})
    console = plain()
    console.print(quality_table({loaded.settings.name: found.quality, **found.baselines}))
    console.print(
        f"\n{found.quality.num_prompts} prompts, {found.out_of_distribution:.1%} of them beyond 99% of those that were held out "
        "of the training.",
        style="dim",
    )  # fmt: skip
    if found.num_truncated:
        console.print(
            f"Baselines and levels: {found.num_truncated} prompts were cut to {max_tokens} tokens.", style="yellow"
        )
    if out is not None:
        draw(found, out)


@app.command()
def show(probe: ProbeFile) -> None:
    """Say what a probe's file holds.

    shoal probe show toxicity.safetensors
    """
    from shoal.signals.probe import Probe

    loaded = Probe.load(probe)
    ours = loaded.settings
    table = Table(box=None, pad_edge=False, show_header=False)
    rows = {
        "name": ours.name,
        "version": loaded.version,
        "operator": {"pool": f"pool ({ours.pooling})", "gate": f"gate (scale {ours.gate_scale:g})"}.get(
            ours.operator, f"attention (factor {ours.factor}, {ours.heads} heads, {ours.pooling})"
        ),
        "classes": ", ".join(ours.classes),
        "decides": f"{ours.classes[1]} from {ours.threshold:.3f} on" if len(ours.classes) == 2 else "the most probable",
        "temperature": f"{ours.temperature:.3g}",
        "levels": f"{ours.num_levels} of {ours.shape.num_layers + 1}, the top one {ours.state}",
        "longest prompt": f"{ours.max_prompt_tokens} tokens" if ours.max_prompt_tokens else "no limit",
        "parameters": f"{loaded.num_parameters:,}",
        "model": f"{ours.shape.num_layers} layers of width {ours.hidden_size}, weights {ours.fingerprint or 'unknown'}",
    }
    for key, value in rows.items():
        table.add_row(key, value)
    plain().print(table)


@app.command()
def export(
    probe: ProbeFile,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="A JSON file.")],
) -> None:
    """Write a probe as JSON, settings and weights, for engines that are not this one.

    shoal probe export toxicity.safetensors -o toxicity.json
    """
    from shoal.signals.probe import Probe

    check_writable(out)
    loaded = Probe.load(probe)
    tensors = {name: tensor.tolist() for name, tensor in loaded.tensors.items()}
    write_json(
        out,
        {**json.loads(json.dumps(asdict(loaded.settings))), "version": loaded.version, "tensors": tensors},
        indent=None,
    )
    plain().print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB", soft_wrap=True)


def plain(*, stderr: bool = False) -> Console:
    """A console that prints names as they are, whatever they would be as markup."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def load(model: str, *, dtype: str, device: str, revision: str | None, token: str | None) -> Engine:
    """The engine that reads prompts."""
    from transformers.utils import logging

    from shoal.engine.engine import Engine

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # the bar of loading weights
    return Engine.from_pretrained(model, dtype=dtype, device=device, revision=revision, token=token)


@contextmanager
def states_in(given: Path | None, resumed: Path | None) -> Iterator[Path]:
    """The directory of extracted states: `given`, which stays; or `resumed`, which goes when all is done, but not where it was
    interrupted; or one that goes in any case."""
    if given is not None:
        yield given
    elif resumed is not None:
        from shoal.signals.extract import remove_states

        yield resumed
        remove_states(resumed)
    else:
        with tempfile.TemporaryDirectory() as directory:
            yield Path(directory)


def quality_table(rows: Mapping[str, Quality]) -> Table:
    """A row each."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for column in ("F1", "AUPRC", "accuracy", "calibration error"):
        table.add_column(column, justify="right")
    for name, one in rows.items():
        table.add_row(name, f"{one.f1:.3f}", f"{one.auprc:.3f}", f"{one.accuracy:.3f}", f"{one.calibration_error:.3f}")
    return table
