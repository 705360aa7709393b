"""`shoal serve`: an OpenAI-compatible server with a depth per request."""

from __future__ import annotations

import logging
import math
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer
from rich.console import Console

from shoal.cli import options
from shoal.cli.options import option
from shoal.depth.plan import Dense
from shoal.engine.engine import Engine
from shoal.engine.intake import resolve_plan
from shoal.errors import InvalidInput, MissingExtra

if TYPE_CHECKING:
    from shoal.signals.guard import Guard
    from shoal.signals.probe import Probe

T = TypeVar("T")
LOCAL = ("127.0.0.1", "::1", "localhost")


def serve(
    model: options.Model,
    *,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one, and says which.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What requests call the model. Default: MODEL as given.")] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="Keys that requests have to show: a key per line, or a name and a key.", metavar="FILE"),
    ] = None,
    depth: options.Depth = None,
    plan: Annotated[
        Path | None,
        option("Depth", "Instead: a JSON file with a plan, as requests may have it in `plan`.", metavar="FILE"),
    ] = None,
    min_depth: Annotated[float, option("Depth", "Smallest depth that a request may ask for.")] = 0.1,
    draft: Annotated[
        Literal["auto", "self", "ngram", "suffix"] | None,
        option("Drafting", "How requests are drafted for that do not say. Default: not at all."),
    ] = None,
    probe: Annotated[
        list[Path] | None,
        option("Probes", "File of a probe that requests may ask for by name; repeat for more.", metavar="FILE"),
    ] = None,
    guard: Annotated[
        list[str] | None,
        option(
            "Probes",
            "Answer nothing to prompts that this probe gives this label: finish_reason is content_filter.",
            metavar="NAME=LABEL",
        ),
    ] = None,
    max_tokens: Annotated[int, option("Limits", "Most new tokens of a request.")] = 1024,
    max_queue: Annotated[int, option("Limits", "Most requests that wait; the next one is answered 429.")] = 256,
    max_documents: Annotated[int, option("Limits", "Most documents of a ranking.")] = 200,
    max_rank_calls: Annotated[int, option("Limits", "Most model calls of a ranking.")] = 200,
    max_rankings: Annotated[int, option("Limits", "Most rankings at once; the next one is answered 429.")] = 8,
    timeout_s: Annotated[float, option("Limits", "Seconds that a request may take, waiting included.")] = 600.0,
    max_body_mib: Annotated[float, option("Limits", "Longest body of a request.")] = 4.0,
    body_timeout_s: Annotated[float, option("Limits", "Seconds in which a body has to arrive.")] = 30.0,
    dtype: options.Dtype = "auto",
    device: Annotated[str, option("Model", "cpu, cuda or cuda:1.")] = "cpu",
    threads: Annotated[int | None, option("Model", "CPU threads. Default: PyTorch's choice.")] = None,
    max_batch: Annotated[int, option("Model", "Most requests that run together.")] = 32,
    max_pass_tokens: Annotated[
        int,
        option("Model", "Most tokens in a pass: longer prompts are read in chunks, so that others go on meanwhile."),
    ] = 512,
    cache_gib: Annotated[float | None, option("Model", "KV cache budget. Default: half of the free memory.")] = None,
    revision: options.Revision = None,
    token: options.Token = None,
) -> None:
    """Serve a model over HTTP, as OpenAI's API and with a page at /.

    shoal serve shoal-e2e

    shoal serve meta-llama/Llama-3.2-1B --dtype int8 --depth 1/2 --port 8080 --api-key-file keys.txt

    Requests may say `"depth": 0.33`, from the openai client with extra_body={"depth": 0.33}.
    """
    try:
        import uvicorn

        from shoal.serve.app import make_app
    except ImportError as error:
        raise MissingExtra(f"serving needs more ({error.name} is missing): pip install 'shoal[serve]'") from error
    from shoal.serve.config import ServeConfig
    from shoal.serve.limits import read_keys
    from shoal.serve.plans import plan_of, policy_of
    from shoal.serve.schema import Plan

    if depth is not None and plan is not None:
        raise InvalidInput("--depth and --plan say the same: give one")
    keys = read_option("--api-key-file", api_key_file, read_keys) if api_key_file else {}
    given = read_option("--plan", plan, lambda text: plan_of(Plan.model_validate_json(text))) if plan else None
    config = ServeConfig(
        model=name or model,
        plan=given or Dense(),
        draft=draft,
        min_depth=min_depth,
        max_tokens=max_tokens,
        max_queue=max_queue,
        max_documents=max_documents,
        max_rank_calls=max_rank_calls,
        max_rankings=max_rankings,
        timeout_s=timeout_s,
        max_body_bytes=int(max_body_mib * 2**20),
        body_timeout_s=body_timeout_s,
        api_keys=keys,
        probes=probes_of(probe or (), guard or ()),
    )
    with listen(host, port) as listening:
        console = Console(stderr=True)
        with console.status(f"loading {model}"):
            engine = Engine.from_pretrained(
                model,
                dtype=dtype,
                device=device,
                threads=threads,
                revision=revision,
                token=token,
                max_batch=max_batch,
                max_pass_tokens=max_pass_tokens,
                cache_gib=cache_gib,
            )
        if depth is not None:
            config = replace(config, plan=policy_of(engine.tuned, depth))
        # An impossible plan, and probes of another model, are refused now, rather than by each request.
        resolve_plan(config.plan, 1, max_tokens, engine.shape.num_layers, engine.tuned)
        engine.observer(config.probes)
        if host not in LOCAL and not keys:
            console.print(f"Whoever reaches {host} can use this server: --api-key-file asks for keys.", style="yellow")
        logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
        logging.getLogger("shoal.serve").setLevel(logging.INFO)
        address = f"[{host}]" if ":" in host else host
        console.print(
            f"{config.model} at http://{address}:{listening.getsockname()[1]}/ (and /v1 for OpenAI's client). Ctrl+C ends it.",
            soft_wrap=True,
            highlight=False,
        )
        served = uvicorn.Config(
            make_app(engine, config),
            log_config=None,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=math.ceil(timeout_s),
        )
        uvicorn.Server(served).run(sockets=[listening])


def probes_of(files: Sequence[Path], guards: Sequence[str]) -> tuple[Probe | Guard, ...]:
    """Probes, those that guard as guards. Raises `InvalidInput` for a guard that names no probe or no label of it."""
    from shoal.signals.guard import Guard
    from shoal.signals.probe import Probe

    probes: dict[str, Probe | Guard] = {}
    for path in files:
        loaded = Probe.load(path)
        if loaded.settings.name in probes:
            raise InvalidInput(f"--probe {path}: there is one named {loaded.settings.name!r} already")
        probes[loaded.settings.name] = loaded
    labels: dict[str, list[str]] = {}
    for one in guards:
        name, equals, label = one.partition("=")
        if not equals or name not in probes:
            raise InvalidInput(
                f"--guard {one}: write NAME=LABEL with the name of a --probe ({', '.join(probes) or 'none'})"
            )
        labels.setdefault(name, []).append(label)
    for name, stop_on in labels.items():
        guarded = probes[name]
        assert isinstance(guarded, Probe)
        probes[name] = Guard(probe=guarded, stop_on=tuple(stop_on))
    return tuple(probes.values())


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections. Raises `InvalidInput` where there cannot be one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise InvalidInput(
            f"cannot listen on {host}, port {port}: {error}; choose another --port, or 0 for any"
        ) from error


def read_option(option_name: str, path: Path, parse: Callable[[str], T]) -> T:
    """What a file says. Raises `InvalidInput` that names option and file."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # InvalidInput is a ValueError
        raise InvalidInput(f"{option_name} {path}: {error}") from error
