"""`shoal generate`: a file of prompts in, a file of completions out, and what they cost."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.text import Text

from shoal.cli import options
from shoal.cli.completions import CompletionsFile
from shoal.cli.format import quantity
from shoal.cli.job import run_prompts
from shoal.cli.options import option
from shoal.cli.prompts import Format, read_prompts
from shoal.cli.savings import savings_table
from shoal.depth.checkpoint import fit_horizon
from shoal.depth.plan import Dense, DepthPlan, DepthPolicy
from shoal.depth.policies import POLICIES
from shoal.depth.routers import load_router
from shoal.draft.choices import SelfDraft
from shoal.engine.engine import Engine
from shoal.engine.request import Generation
from shoal.engine.run_cost import RunCost
from shoal.engine.sampling import Sampling
from shoal.errors import InvalidInput
from shoal.models.checkpoint import load_tokenizer
from shoal.signals.probe import Probe


def generate(
    model: options.Model,
    prompts: Annotated[str, typer.Argument(help="JSONL, CSV or text, a prompt per line; - is standard input.")],
    *,
    out: Annotated[str, typer.Option("--out", "-o", help="JSONL file of completions; - is standard output.")],
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted OUT.")] = False,
    format: Annotated[Format | None, typer.Option(help="Of PROMPTS. Default: by its suffix, text for -.")] = None,
    prompt_column: Annotated[
        str | None, typer.Option(help="Field or column that holds the prompt. Default: prompt, or the only column.")
    ] = None,
    token_ids: Annotated[bool, typer.Option("--token-ids", help="Write the tokens of each completion.")] = False,
    compare_dense: Annotated[
        bool, typer.Option("--compare-dense", help="Then run every layer as well, and compare wall clock.")
    ] = False,
    timeout_s: Annotated[float | None, typer.Option(help="Seconds after which it stops; --resume goes on.")] = None,
    depth: options.Depth = None,
    policy_name: options.Policy = "skipdecode",
    router: Annotated[
        Path | None,
        option(
            "Depth",
            "Instead of a depth: a router that `shoal route` trained picks each prompt's layers.",
            metavar="DIRECTORY",
        ),
    ] = None,
    min_layers: options.MinLayers = None,
    max_layers: options.MaxLayers = None,
    horizon: options.Horizon = None,
    horizon_from: Annotated[
        Path | None,
        option("Depth", "Fit the horizon: expected lengths in tokens, one per line, or JSONL with `completion`."),
    ] = None,
    warmup_layers: options.WarmupLayers = None,
    clock: options.Clock = "generated",
    prompt_layers: options.PromptLayers = "all",
    draft: Annotated[
        str | None,
        option(
            "Drafting",
            "Propose tokens cheaply and verify them; completions stay the same. auto, self, ngram, suffix, trigram, "
            "or a smaller checkpoint with the same tokenizer.",
            metavar="NAME",
        ),
    ] = None,
    draft_plan: Annotated[
        Path | None,
        option(
            "Drafting", "Draft with these layers of the model itself: a file of `shoal draft-plan`.", metavar="FILE"
        ),
    ] = None,
    probe: Annotated[
        list[Path] | None,
        option(
            "Probes",
            "Label each prompt, in the pass that reads it: a file of `shoal probe fit`; may be repeated.",
            metavar="FILE",
        ),
    ] = None,
    max_new_tokens: Annotated[int, option("Sampling", "Most tokens to emit, end of sequence included.")] = 64,
    min_new_tokens: Annotated[int, option("Sampling", "Tokens to emit before the end is allowed.")] = 0,
    temperature: Annotated[float, option("Sampling", "0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, option("Sampling", "Keep the k most probable tokens.")] = None,
    top_p: Annotated[float | None, option("Sampling", "Keep the most probable tokens that reach p together.")] = None,
    min_p: Annotated[
        float | None, option("Sampling", "Keep tokens with this share of the most probable one's probability.")
    ] = None,
    repetition_penalty: Annotated[float, option("Sampling", "1 is off.")] = 1.0,
    presence_penalty: Annotated[float, option("Sampling", "Subtracted once from tokens that were emitted.")] = 0.0,
    frequency_penalty: Annotated[float, option("Sampling", "Subtracted per time a token was emitted.")] = 0.0,
    stop: Annotated[list[str] | None, option("Sampling", "A string that ends the completion; may be repeated.")] = None,
    ignore_eos: Annotated[bool, option("Sampling", "Go on past end of sequence.", "--ignore-eos")] = False,
    seed: Annotated[int, option("Sampling", "Of the first prompt's noise; prompt i has SEED + i.")] = 0,
    n: Annotated[int, option("Sampling", "Completions per prompt.")] = 1,
    logprobs: Annotated[
        int | None, option("Sampling", "Write the log-probabilities of emitted tokens and of this many top ones.")
    ] = None,
    entropy: Annotated[
        bool,
        option(
            "Sampling",
            "Write each completion's entropy trace over the top 20 tokens, for `shoal monitor`.",
            "--entropy",
        ),
    ] = False,
    dtype: options.Dtype = "auto",
    device: Annotated[str, option("Model", "cpu, cuda or cuda:1.")] = "cpu",
    threads: Annotated[int | None, option("Model", "CPU threads. Default: PyTorch's choice.")] = None,
    max_batch: Annotated[int, option("Model", "Most requests that run together.")] = 32,
    cache_gib: Annotated[float | None, option("Model", "KV cache budget. Default: half of the free memory.")] = None,
    revision: options.Revision = None,
    token: options.Token = None,
) -> None:
    """Complete a file of prompts.

    shoal generate shoal-e2e prompts.jsonl -o completions.jsonl --depth 1/2

    head -1 prompts.txt | shoal generate shoal-e2e - -o - --depth 1/3

    shoal generate shoal-e2e prompts.jsonl -o completions.jsonl --draft auto

    shoal generate shoal-e2e prompts.jsonl -o completions.jsonl --draft-plan draft_plan.json

    shoal generate shoal-e2e prompts.jsonl -o traces.jsonl --entropy
    """
    policy = options.depth_policy(
        policy=policy_name,
        depth=depth,
        min_layers=min_layers,
        max_layers=max_layers,
        horizon=horizon,
        warmup_layers=warmup_layers,
        clock=clock,
        prompt_layers=prompt_layers,
    )
    if router is not None:
        if not isinstance(policy, Dense):
            raise InvalidInput("--router picks the layers itself: leave --depth and bounds out")
        policy = load_router(router)
    if horizon_from is not None and (horizon is not None or not hasattr(policy, "horizon")):
        raise InvalidInput(
            "--horizon-from goes with --depth or bounds of a policy that has a horizon, and instead of --horizon"
        )
    if compare_dense and isinstance(policy, Dense):
        raise InvalidInput("--compare-dense compares a plan with every layer: give it a depth with --depth, or bounds")
    if draft_plan is not None and draft not in (None, "self"):
        raise InvalidInput(f"--draft-plan drafts with the model itself: leave --draft {draft} out")
    drafting = draft if draft_plan is None else SelfDraft(plan=DepthPlan.load(draft_plan))
    lines = read_prompts(prompts, format=format, column=prompt_column)
    console = Console(stderr=True)
    if horizon_from is not None:
        fitted = fit_horizon(read_lengths(horizon_from, model, revision=revision, token=token))
        policy = replace(cast(Any, policy), horizon=fitted)
        console.print(Text(f"horizon {fitted}, the median length in {horizon_from}"))
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
        seed=seed,
        n=n,
        logprobs=logprobs,
        entropy_top_k=20 if entropy else None,
    )
    settings = settings_of(
        policy,
        sampling,
        model=model,
        revision=revision,
        dtype=dtype,
        token_ids=token_ids,
        router=router,
        probes=probe or (),
    )
    with CompletionsFile(out, lines, samples=n, settings=settings, resume=resume) as completions:
        engine = Engine.from_pretrained(
            model,
            dtype=dtype,
            device=device,
            threads=threads,
            revision=revision,
            token=token,
            max_batch=max_batch,
            cache_gib=cache_gib,
        )
        first = completions.num_written
        if first:
            console.print(f"{first} of {len(lines)} prompts are done already", highlight=False)
        run_todo = partial(
            run_prompts,
            engine,
            lines,
            sampling,
            first=first,
            timeout_s=timeout_s,
            draft=drafting,
            console=console,
            probes=probe or (),
        )

        def write(done: Generation) -> None:
            if done.finish_reason != "timeout":
                completions.add(done.index, done.sample, record(done, token_ids=token_ids))

        try:
            if compare_dense:  # the first passes of a process are slow, whatever the plan
                short = replace(sampling, max_new_tokens=min(max_new_tokens, 8), min_new_tokens=0, n=1)
                few = lines[: first + max_batch]
                run_prompts(engine, few, short, policy, first=first, console=console, label="warming up")
            run = run_todo(policy, label="generating", on_finish=write)
            timed_out = completions.num_written < len(lines)
            dense = run_todo(Dense(), label="every layer") if compare_dense and not timed_out else None
        except KeyboardInterrupt:
            console.print(how_far("Interrupted", completions.num_written, len(lines), out), soft_wrap=True)
            raise typer.Exit(130) from None
    if run.num_requests:
        report(console, run, dense)
    if timed_out:
        console.print(how_far("Timed out", completions.num_written, len(lines), out), soft_wrap=True)
    if run.num_failed or timed_out:
        raise typer.Exit(1)


def settings_of(
    policy: DepthPolicy,
    sampling: Sampling,
    *,
    model: str,
    revision: str | None,
    dtype: str,
    token_ids: bool,
    router: Path | None = None,
    probes: Sequence[Path] = (),
) -> dict[str, Any]:
    """What decides the completions, where it is not the default, as it comes out of JSON."""
    settings: dict[str, Any] = {"model": model}
    if revision is not None:
        settings["revision"] = revision
    if dtype != "auto":
        settings["dtype"] = dtype
    if token_ids:
        settings["token_ids"] = True
    if router is not None:
        settings["router"] = str(router)
    if probes:
        settings["probes"] = [Probe.load(path).version for path in probes]
    name = next((name for name, kind in POLICIES.items() if isinstance(policy, kind)), "")
    if name not in ("", "skipdecode"):
        settings["policy"] = name
    for options_of in cast(Any, (policy, sampling) if name else (sampling,)):
        for field in fields(options_of):
            value = getattr(options_of, field.name)
            default = field.default if field.default_factory is MISSING else field.default_factory()
            if value != default:  # a field without a default is always one that decides
                # A line has a field `prompt` already.
                settings["prompt_layers" if field.name == "prompt" else field.name] = value
    return cast(dict[str, Any], json.loads(json.dumps(settings)))


def how_far(why: str, num_written: int, num_prompts: int, out: str) -> Text:
    """What there is after a run that ended early, and the command that continues it."""
    message = f"{why}: {num_written} of {num_prompts} prompts are in {out}."
    if out != "-":
        command = [argument for argument in sys.argv[1:] if argument != "--resume"]
        message += f"\nContinue with: shoal {shlex.join(command)} --resume"
    return Text(message)


def record(done: Generation, *, token_ids: bool) -> dict[str, Any]:
    """What the output says of a completion, beside the fields of its prompt."""
    ledger = done.ledger
    flops = ledger.prompt_flops + ledger.decode_flops + ledger.draft_flops
    fields: dict[str, Any] = {"completion": done.text}
    if token_ids:
        fields["token_ids"] = list(done.token_ids)
    if done.logprobs is not None:
        fields["logprobs"] = [
            {"token_id": token, "logprob": position.logprob, "top": [list(pair) for pair in position.top.items()]}
            for token, position in zip(done.token_ids, done.logprobs, strict=True)
        ]
    if done.trace is not None:
        fields["trace"] = done.trace.to_dict()
    fields["finish_reason"] = done.finish_reason
    if done.error is not None:
        fields["error"] = done.error
    fields["past_horizon"] = done.past_horizon
    if done.labels is not None:
        fields["labels"] = {name: asdict(label) for name, label in done.labels.items()}
    if done.drafting is not None:
        fields["drafting"] = {
            "drafted": done.drafting.drafted,
            "accepted": done.drafting.accepted,
            "passes": done.drafting.steps,
            "off": done.drafting.off,
        }
    fields["usage"] = {
        "prompt_tokens": ledger.prompt_tokens,
        "new_tokens": ledger.new_tokens,
        "mean_layers": round(ledger.mean_layers, 3),
        "layer_tokens": ledger.layer_tokens,
        "layer_tokens_saved": ledger.layer_tokens_saved,
        "flops": flops,
        "flops_saved": ledger.dense_prompt_flops + ledger.dense_decode_flops - flops,
    }
    return fields


def report(console: Console, run: RunCost, dense: RunCost | None) -> None:
    """The end of a run: what it cost, and what the user should know about it."""
    stats, new_tokens = run.stats, run.ledger.new_tokens
    seconds = stats.prompt_s + run.decode_s
    console.print(
        f"{run.num_requests} completions, {new_tokens} tokens in {seconds:.1f} s "
        f"({new_tokens / max(1e-9, seconds):.0f} tokens/s), "
        f"peak cache {quantity(stats.peak_cache_bytes, 'B')}",
        highlight=False,
    )
    console.print(savings_table(run, dense))
    if run.drafting.passes or run.drafting.passes_without:
        console.print(drafting_line(run), highlight=False)
    if dense is not None and run.decode_s:
        console.print(
            f"Speedup over every layer, per token: {dense.decode_s_per_token / run.decode_s_per_token:.2f}x decode, "
            f"{dense.total_s_per_token / run.total_s_per_token:.2f}x whole request (one run of each, not repeated: "
            "on a busy machine, or with few prompts, another pair of runs may say something else).",
            highlight=False,
        )
    if run.num_past_horizon:
        console.print(
            f"{run.num_past_horizon} of {run.num_requests} completions ran on past the horizon, at the minimum depth.",
            highlight=False,
        )
    if run.num_failed:
        console.print(
            f"[bold red]{run.num_failed} of {run.num_requests} completions failed[/]: their lines have an `error`.",
            highlight=False,
        )


def drafting_line(run: RunCost) -> str:
    """What drafting did, and why it was off where it was."""
    done, steps = run.drafting, max(1, run.drafting.steps)
    line = f"Drafting: {run.ledger.decode_passes / steps:.2f} tokens per pass"
    if done.acceptance is not None:
        line += f", {done.accepted} of {done.drafted} drafted tokens accepted ({100 * done.acceptance:.0f}%)"
    if done.off:
        line += f"; off in {done.passes_without} of {steps} passes: "
        line += ", ".join(
            f"{reason} ({count})" for reason, count in sorted(done.off.items(), key=lambda item: -item[1])
        )
    beyond = quantity(run.ledger.draft_flops, "FLOPs")
    return f"{line}. It took {beyond} beyond the plan's, and {run.stats.draft_s:.2f} s to propose."


def read_lengths(path: Path, model: str, *, revision: str | None, token: str | None) -> list[int]:
    """Expected completion lengths in tokens: JSONL with `completion` is tokenised as `model` does, otherwise a number per line.

    Raises `InvalidInput` naming the line.
    """
    if path.suffix in (".jsonl", ".ndjson"):
        texts = []
        for line in read_prompts(str(path), column="completion"):
            texts.append(line.fields.get("completion"))
            if not isinstance(texts[-1], str):  # a line with `prompt_token_ids` needs no other field to be a prompt
                raise InvalidInput(f"{path}, line {line.line}: no field 'completion' that holds text")
        tokenizer = load_tokenizer(model, revision=revision, token=token)
        # The token that ends a completion counts.
        return [len(tokenizer.encode(text, add_special_tokens=False)) + 1 for text in texts]
    lengths = []
    for line in read_prompts(str(path), format="text"):
        try:
            lengths.append(int(str(line.prompt)))
        except ValueError:
            raise InvalidInput(f"{path}, line {line.line}: expected a length in tokens, got {line.prompt!r}") from None
    return lengths
