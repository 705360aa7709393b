"""`shoal voids`: which layers add little to which tokens, as a table and a heat map."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from shoal.baselines.layerwise import LayerwiseDecoder
from shoal.baselines.voids import VoidMap, draw, emptiest, trace
from shoal.cli import options
from shoal.cli.job import complete
from shoal.cli.options import option
from shoal.cli.prompts import Format, PromptLine, read_prompts
from shoal.engine.engine import Engine
from shoal.engine.intake import check_length
from shoal.engine.sampling import Sampling
from shoal.errors import InvalidInput
from shoal.files import check_writable, write_json

IMAGES = (".png", ".svg", ".pdf")
NOTHING_SAVED = (
    "Nothing is saved by this: every layer ran, and whether one was a void is known only afterwards. To leave layers out, "
    "choose a depth plan (shoal plan) and measure what it costs in quality."
)


def voids(
    model: options.Model,
    *,
    prompts: Annotated[str, typer.Option(help="JSONL, CSV or text, a prompt per line; - is standard input.")],
    alpha: Annotated[
        float, typer.Option(help="0 to 1: a layer is a void below this share of the range of earlier layers' growth.")
    ] = 0.8,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Heat map: PNG, SVG or PDF.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="File for the counts by layer and position.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of a response, generated greedily.")] = 64,
    response_column: Annotated[
        str | None, typer.Option(help="Field or column with responses, instead of generating them.")
    ] = None,
    format: Annotated[Format | None, typer.Option(help="Of PROMPTS. Default: by its suffix, text for -.")] = None,
    prompt_column: Annotated[
        str | None, typer.Option(help="Field or column that holds the prompt. Default: prompt, or the only column.")
    ] = None,
    dtype: options.Dtype = "auto",
    device: Annotated[str, option("Model", "cpu, cuda or cuda:1.")] = "cpu",
    revision: options.Revision = None,
    token: options.Token = None,
) -> None:
    """Probe which layers are voids (they add little to a token), for prompts and for responses. It saves nothing.

    shoal voids shoal-e2e --prompts prompts.txt --out voids.png --json voids.json
    """
    if out is not None and out.suffix.lower() not in IMAGES:
        raise InvalidInput(f"--out {out}: the suffix must be one of {', '.join(IMAGES)}")
    for path in (out, json_):
        if path is not None:
            check_writable(path)
    if not 0 <= alpha <= 1:
        raise InvalidInput(f"--alpha must be 0 to 1, got {alpha}")
    sampling = Sampling(max_new_tokens=max_new_tokens)
    lines = read_prompts(prompts, format=format, column=prompt_column)
    console = Console()
    loaded = LayerwiseDecoder.from_pretrained(model, dtype=dtype, device=device, revision=revision, token=token)
    texts = generated(loaded, lines, sampling) if response_column is None else given(loaded, lines, response_column)
    found = trace(loaded, texts, alpha=alpha)
    if out is not None:
        draw(found, out, title=f"{model}: voids at alpha {alpha:g}, {len(texts)} prompts")
    if json_ is not None:
        write_json(json_, {"model": model, **found.to_dict()}, indent=None)
    console.print(table_of(found))
    console.print("\n" + summary(found), soft_wrap=True, highlight=False)


def generated(
    model: LayerwiseDecoder, lines: Sequence[PromptLine], sampling: Sampling
) -> list[tuple[list[int], list[int]]]:
    """Prompts with the engine's dense greedy responses, less the last token: it is emitted and never consumed."""
    engine = Engine(model.decoder, model.tokenizer)
    done = complete(engine, lines, sampling, console=Console(stderr=True), label="responding")
    return [(model.encode_one(line.prompt), list(one.token_ids[:-1])) for line, one in zip(lines, done, strict=True)]


def given(model: LayerwiseDecoder, lines: Sequence[PromptLine], column: str) -> list[tuple[list[int], list[int]]]:
    """Prompts with the responses of the file, every token of which is consumed before the text can end."""
    texts = []
    for line in lines:
        response = line.fields.get(column)
        if not isinstance(response, str) or not response:
            raise InvalidInput(f"line {line.line}: no field {column!r} that holds a response")
        try:
            prompt, tokens = model.encode_one(line.prompt), model.encode_completion(response)
            check_length(len(prompt), len(tokens), model.config)
        except InvalidInput as error:
            raise type(error)(f"line {line.line}: {error}") from error
        texts.append((prompt, tokens))
    return texts


def table_of(found: VoidMap) -> Table:
    """A row per layer, top layer first: the share of prompt and of response tokens of which it is a void."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layer", justify="right")
    table.add_column("void of prompt tokens", justify="right")
    table.add_column("of response tokens", justify="right")
    shares = list(zip(found.prompt.by_layer.tolist(), found.response.by_layer.tolist(), strict=True))
    for layer in reversed(range(found.num_layers)):
        table.add_row(str(layer), *map(_percent, shares[layer]))
    table.add_row("all", _percent(found.prompt.share), _percent(found.response.share), style="bold")
    return table


def summary(found: VoidMap) -> str:
    """What was found in a sentence, and that it saves nothing."""
    layers = ", ".join(map(str, emptiest(found)))
    most = f"Most often void: layers {layers}." if layers else "No layer was a void of any token."
    tokens = f"{int(found.prompt.tokens.sum())} prompt tokens and {int(found.response.tokens.sum())} response tokens"
    return f"{tokens}, alpha {found.alpha:g}. {most}\n{NOTHING_SAVED}"


def _percent(share: float) -> str:
    return "-" if share != share else f"{100 * share:.1f}%"
