"""`shoal rank`: documents ranked by a model, within a budget of calls."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from shoal.cli import options
from shoal.cli.options import option
from shoal.cli.progress import stages
from shoal.errors import InvalidInput, LanguageModelError
from shoal.files import check_writable, replaced

if TYPE_CHECKING:
    from shoal.rank.inputs import RankJob
    from shoal.rank.ranking import RankConfig, Ranking

TAG = "shoal"


def rank(
    *,
    docs: Annotated[
        Path, typer.Option(help="Documents: JSONL with 'text' and perhaps 'id' and 'score', or one per line.")
    ],
    model: Annotated[str, typer.Option("--model", "-m", help="A checkpoint, hub id, or http://host:8000/v1#name.")],
    query: Annotated[
        str | None, typer.Option(help="One query; the documents are its candidates, the best first.")
    ] = None,
    queries: Annotated[
        Path | None, typer.Option(help="Many: JSONL with 'id' and 'text', or a tab between them.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="With --queries: a TREC run file with the candidates of each.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File: .jsonl, or else a TREC run file.")] = None,
    k: Annotated[
        int | None, option("Ranking", "Places that matter. Default: 10, or all.", "--k", "-k", show_default=False)
    ] = None,
    budget: Annotated[int, option("Ranking", "Most model calls per query.")] = 100,
    ranker: Annotated[str, option("Ranking", "auto, adaptive, quicksort, heapsort, setwise, ...", "--ranker")] = "auto",
    depth: Annotated[
        int | None,
        option("Ranking", "Only the first so many candidates. Default: 100 of a run file.", show_default=False),
    ] = None,
    direction: Annotated[
        Literal["one", "both", "random"], option("Ranking", "Which document is shown first: as is, both ways, drawn.")
    ] = "random",
    soft: Annotated[bool, option("Ranking", "Count the model's margin, not its vote.", "--soft")] = False,
    seed: Annotated[int, option("Ranking", "Of directions and draws.")] = 0,
    mode: Annotated[
        Literal["score", "generate"], option("Asking", "Score the answers, or let the model write.")
    ] = "score",
    chat: Annotated[bool, option("Asking", "Ask by the model's chat template.", "--chat")] = False,
    template: Annotated[str | None, option("Asking", "A .toml file with your own prompt.")] = None,
    max_query_tokens: Annotated[int, option("Asking", "Tokens of the query that are shown (of a server: words).")] = 64,
    max_passage_tokens: Annotated[int, option("Asking", "The same of each document.")] = 128,
    cache: Annotated[
        Path | None, option("Asking", "Answers that are kept. Default: beside --out.", show_default=False)
    ] = None,
    plan: Annotated[bool, option("Asking", "Say what it would cost, and ask nothing.", "--plan")] = False,
    batch: Annotated[int, option("Model", "Prompts that run together.")] = 32,
    max_retries: Annotated[
        int | None, option("Model", "Of a request to a server. Default: 5.", show_default=False)
    ] = None,
    dtype: options.Dtype = "auto",
    device: Annotated[str, option("Model", "Of a checkpoint: cpu, cuda or cuda:1.")] = "cpu",
) -> None:
    """Rank documents with a language model that compares them, within a budget of calls.

    Go on with an interrupted job by the same command: answers are kept, and none is paid for twice.

    shoal rank --query "do fish sleep?" --docs passages.jsonl --model models/qwen --budget 100

    shoal rank --queries topics.tsv --run bm25.trec --docs corpus.jsonl --model http://localhost:8000/v1#qwen -o ranked.trec
    """
    from shoal.lm.cache import AnswerCache
    from shoal.lm.cached import CachedModel
    from shoal.lm.resolve import load_model
    from shoal.rank.ranking import RankConfig, check_documents, check_read, rank_with

    console, errors = Console(), Console(stderr=True)
    config = RankConfig(
        k=10 if k is None else k, budget=budget, ranker=ranker, direction=direction, soft=soft, mode=mode, chat=chat,
        template=template, max_query_tokens=max_query_tokens, max_passage_tokens=max_passage_tokens, seed=seed,
    )  # fmt: skip
    config.make()
    jobs = jobs_of(query, queries, run, docs, depth)
    for job in jobs:
        try:
            check_documents(job.query, job.texts)
        except InvalidInput as error:
            raise InvalidInput(f"query {job.query_id!r}: {error}") from None
        if k is not None and k > len(job.texts):
            raise InvalidInput(f"query {job.query_id!r}: --k {k} is above its {len(job.texts)} documents")
    if out is not None:
        check_output(out, jobs, {"--docs": docs, "--queries": queries, "--run": run})
    if plan:
        console.print(forecast_line(config, jobs, batch), highlight=False, soft_wrap=True)
        return
    asked = load_model(model, **model_options(model, batch, dtype, device, chat, max_retries))
    kept = cache or (None if out is None else out.with_name(out.name + ".answers"))
    if kept is not None:
        asked = CachedModel(asked, AnswerCache(kept))
    done: dict[str, Ranking] = {}
    with stages(errors) as show:
        num_answers = 0

        def hear() -> None:
            nonlocal num_answers
            num_answers += 1
            show("calls", num_answers, len(jobs) * budget)

        for number, job in enumerate(jobs):
            num_answers = number * budget
            try:
                done[job.query_id] = rank_with(asked, config, job.query, job.texts, scores=job.scores, on_answer=hear)
            except LanguageModelError as error:
                hint = f"answers so far are in {kept}: the same command goes on from there" if kept else "give --cache"
                raise LanguageModelError(f"query {job.query_id!r}: {error} ({hint})") from error
            check_read(list(done.values()), asked.name, config)
    if out is not None:
        write(out, jobs, done, config.ranker)
    if len(jobs) == 1:
        console.print(documents_table(jobs[0], done[jobs[0].query_id], config.k))
    console.print(summary(list(done.values())), highlight=False, soft_wrap=True)


def check_output(out: Path, jobs: list[RankJob], inputs: dict[str, Path | None]) -> None:
    """Raises `InvalidInput` where the result could not be written, or would take the place of what it is made from."""
    from shoal.rank.trec import check_ids

    for name, path in inputs.items():
        if path is not None and path.resolve() == out.resolve():
            raise InvalidInput(f"--out {out} is the file that {name} is read from: choose another")
    check_writable(out)
    if out.suffix != ".jsonl":
        check_ids(one for job in jobs for one in (job.query_id, *job.ids))


def jobs_of(query: str | None, queries: Path | None, run: Path | None, docs: Path, depth: int | None) -> list[RankJob]:
    """What is to be ranked. Raises `InvalidInput`."""
    from shoal.rank.inputs import RankJob, jobs_of_run, read_documents, read_queries

    if (query is None) == (run is None) or (run is None) != (queries is None):
        raise InvalidInput("give --query, or else --queries and --run")
    if depth is not None and depth < 1:
        raise InvalidInput(f"--depth must be 1 or more, got {depth}")
    texts, scores = read_documents(docs)
    if query is not None:
        ids, scores = tuple(texts)[:depth], None if scores is None else scores[:depth]
        return [RankJob(query_id="1", query=query, ids=ids, texts=tuple(texts.values())[:depth], scores=scores)]
    assert run is not None
    assert queries is not None
    asked = read_queries(queries)
    jobs = jobs_of_run(run, asked, texts, depth=100 if depth is None else depth)
    if len(jobs) < len(asked):
        print(
            f"{len(asked) - len(jobs)} of {len(asked)} queries have no candidates in {run}: left out", file=sys.stderr
        )
    return jobs


def model_options(
    model: str,
    batch: int,
    dtype: str = "auto",
    device: str = "cpu",
    chat: bool = False,
    max_retries: int | None = None,
) -> dict[str, Any]:
    """Options of a checkpoint or of a server."""
    if not model.startswith(("http://", "https://")):
        if max_retries is not None:
            raise InvalidInput("--max-retries is for servers: a checkpoint that runs here is asked once")
        return {"dtype": dtype, "device": device, "max_batch": batch}
    from shoal.lm.remote import RemoteLimits

    if dtype != "auto" or device != "cpu":
        raise InvalidInput("--dtype and --device are for checkpoints that run here: a server decides its own")
    return {
        "limits": RemoteLimits(concurrency=batch, **({} if max_retries is None else {"max_retries": max_retries})),
        "api": "chat" if chat else "completions",
    }


def write(out: Path, jobs: list[RankJob], done: dict[str, Ranking], ranker: str) -> None:
    """JSON Lines with costs, or a TREC run file."""
    from shoal.rank.trec import write_run

    if out.suffix != ".jsonl":
        orders = {job.query_id: [job.ids[one] for one in done[job.query_id].order] for job in jobs}
        return write_run(out, orders, f"{TAG}-{ranker}")
    lines = []
    for job in jobs:
        ranking = done[job.query_id]
        cost = ranking.cost
        lines.append(
            {
                "query_id": job.query_id,
                "query": job.query,
                "documents": [job.ids[one] for one in ranking.order],
                "calls": cost.calls,
                "paid_calls": cost.usage.paid_calls,
                "rounds": cost.rounds,
                "tokens": cost.tokens,
                "unparsed": cost.unparsed,
                "finished": ranking.finished,
                "cut_documents": ranking.cut_documents,
                "cut_query": ranking.cut_query,
            }
        )
    with replaced(out) as partial:
        partial.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def documents_table(job: RankJob, ranking: Ranking, k: int) -> Table:
    """The best k."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in (("place", "right"), ("was", "right"), ("id", "left"), ("document", "left")):
        table.add_column(name, justify=justify, no_wrap=name != "document")  # type: ignore[arg-type]
    for document in ranking.documents[:k]:
        text = " ".join(document.text.split())
        table.add_row(str(document.place), str(document.index + 1), job.ids[document.index], text[:100])
    return table


def summary(rankings: list[Ranking]) -> str:
    """What it took, in a line or two."""
    total = sum((one.cost.usage for one in rankings[1:]), rankings[0].cost.usage)
    calls, unparsed = (sum(getattr(one.cost, name) for one in rankings) for name in ("calls", "unparsed"))
    cut = sum(one.cut_documents for one in rankings)
    said = (
        f"{calls} calls ({total.paid_calls} paid for now), {sum(one.cost.rounds for one in rankings)} rounds, "
        f"{total.prompt_tokens + total.new_tokens} tokens"
    )
    if unparsed:
        said += f"; {unparsed} answers could not be read and count as ties"
    if cut:
        said += f"; of {cut} documents only the beginning was shown"
    if cut_queries := sum(one.cut_query for one in rankings):
        said += f"; of {cut_queries} queries as well"
    return said


def forecast_line(config: RankConfig, jobs: list[RankJob], batch: int) -> str:
    """What rankings would take, by the numbers of their documents."""
    from shoal.rank.forecast import plan as forecast

    ranker, _ = config.make()
    sizes = Counter(len(job.texts) for job in jobs)
    costs = {
        n: forecast(n, min(config.k, n), ranker, batch, budget=config.budget, direction=config.direction) for n in sizes
    }
    calls, rounds = (sum(getattr(costs[n], name) * count for n, count in sizes.items()) for name in ("calls", "rounds"))
    low, high = min(cost.low_calls for cost in costs.values()), max(cost.high_calls for cost in costs.values())
    return (
        f"About {calls / len(jobs):.0f} calls per query ({low} to {high} on simulated ones), {rounds / len(jobs):.0f} rounds at "
        f"batch {batch}; {calls:.0f} calls for {len(jobs)} {'query' if len(jobs) == 1 else 'queries'}."
    )
