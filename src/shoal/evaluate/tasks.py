"""What a task is: prompts, references, metrics; the ones that come with Shoal, and any JSONL file of one's own.

Data is a local file, a directory that holds the task's file (plain or `.gz`), or a dataset on the hub (`owner/name`, or
`owner/name/path/to/file.jsonl`). A file of one's own has a line per input:

    {"prompt": "2 + 3 =", "answer": "5", "metric": "exact_match"}
    {"prompt": "Summarise: ...", "references": ["...", "..."], "metric": ["rouge_l", "chrf"]}
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shoal.errors import InvalidInput, nearest
from shoal.evaluate.e2e import read_e2e
from shoal.evaluate.metrics import metric_named
from shoal.jsonl import parse_jsonl


@dataclass(frozen=True, kw_only=True)
class TaskInput:
    """One input of a task."""

    prompt: str
    """What the model gets, as it stands."""
    references: tuple[str, ...]
    """What its output is compared with, one or more."""
    completion: str
    """What follows the prompt in teacher forcing, with the space between them where there is one: mostly the first reference."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """How a task's file is read, and how outputs are judged."""

    name: str
    """Name, or path of one's own file."""
    file: str
    """What the file is called in a directory or repository; `.gz` may follow."""
    read: Callable[[Path], list[TaskInput]]
    """Reads it. Raises `InvalidInput` with line and field."""
    metrics: tuple[str, ...]
    """Names in `shoal.evaluate.metrics.METRICS`, the main one first."""
    max_new_tokens: int
    """Most tokens of an output; in language modelling the tokens that follow the prefix."""
    stop: tuple[str, ...] = ()
    """Strings that end an output."""
    prefix_tokens: int | None = None
    """In language modelling: tokens of each window that are read as the prompt. None: outputs are generated."""


def load_task(
    name: str, data: str | None, *, metrics: tuple[str, ...] | None = None, max_new_tokens: int | None = None
) -> tuple[Task, list[TaskInput]]:
    """The task and its inputs.

    Args:
        name: one of `TASKS`, or a JSONL file of one's own (a path or a file on the hub).
        data: file, directory or hub dataset of a built-in task.
        metrics, max_new_tokens: instead of the task's own.

    Raises `InvalidInput` for unknown names and for data that cannot be read, with line and field.
    """
    if name in TASKS:
        if data is None:
            raise InvalidInput(
                f"the task {name!r} needs data: give {TASKS[name].file} or its directory, or a dataset on the hub (owner/name)"
            )
        task = TASKS[name]
        inputs = task.read(find_file(data, task.file))
    elif looks_like_file(name):
        if data is not None:
            raise InvalidInput(
                f"{name} is a file of its own: leave out the data ({data}), or name one of {', '.join(TASKS)}"
            )
        task, inputs = read_own(find_file(name, None), metrics)
    else:
        raise InvalidInput(f"unknown task {name!r}: {nearest(name, TASKS)}; or give a JSONL file of your own")
    if metrics is not None:
        if task.prefix_tokens is not None:
            raise InvalidInput(f"the task {name!r} has the loss as its metric and no other")
        for metric in metrics:
            metric_named(metric)
        task = replace(task, metrics=metrics)
    if max_new_tokens is not None:
        task = replace(task, max_new_tokens=max_new_tokens)
    if not inputs:
        raise InvalidInput(f"{data or name} holds no inputs")
    return task, inputs


def looks_like_file(name: str) -> bool:
    """Whether a task's name stands for a file."""
    return "/" in name or Path(name).exists() or bool(re.search(r"\.jsonl?(\.gz)?$", name))


def find_file(data: str, file: str | None) -> Path:
    """The local path of `data`; `file` is what to look for in a directory or repository. Raises `InvalidInput`."""
    path = Path(data).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if file is None:
            raise InvalidInput(f"{path} is a directory: give a JSONL file")
        for candidate in (path / file, path / f"{file}.gz"):
            if candidate.is_file():
                return candidate
        raise InvalidInput(f"{path} has no {file} (nor {file}.gz): give the file itself")
    on_hub = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/(.+))?", data)
    if path.exists() or not on_hub or data.startswith("."):
        raise InvalidInput(f"no such file: {data}")
    return _from_hub(on_hub[1], on_hub[2] or file)


def _from_hub(repository: str, file: str | None) -> Path:
    """Download one file of a dataset. Raises `InvalidInput` where it cannot be had."""
    if file is None:
        raise InvalidInput(
            f"no such file: {repository}; for a dataset on the hub give its file, too: {repository}/FILE.jsonl"
        )
    import huggingface_hub

    reasons = []
    for candidate in (file, f"{file}.gz"):
        try:
            return Path(huggingface_hub.hf_hub_download(repository, candidate, repo_type="dataset"))
        except Exception as error:  # the client raises errors of its own, of the HTTP library and of the system
            reasons.append(str(error).strip().split("\n")[0])
    raise InvalidInput(f"no such file: {repository}; and no dataset's {file} could be had from the hub: {reasons[0]}")


def read_text(path: Path) -> str:
    """A UTF-8 file, gzipped where its name says so. Raises `InvalidInput`."""
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} cannot be read as UTF-8 text: {error}") from error


def field(row: dict[str, Any], name: str, where: str) -> Any:
    """`row[name]`. Raises `InvalidInput` where it is missing or empty."""
    if name not in row:
        raise InvalidInput(f"{where}: field {name!r} is missing; the line has {', '.join(map(repr, row)) or 'none'}")
    if row[name] in ("", [], None):
        raise InvalidInput(f"{where}: {name!r} is empty")
    return row[name]


def text_field(row: dict[str, Any], name: str, where: str) -> str:
    """`row[name]`, a string with more than white space. Raises `InvalidInput`."""
    value = field(row, name, where)
    if not isinstance(value, str) or not value.strip():
        raise InvalidInput(f"{where}: {name!r} must be a string that is not empty, got {value!r}")
    return value


def texts_field(row: dict[str, Any], name: str, where: str) -> tuple[str, ...]:
    """`row[name]`, one or several such strings. Raises `InvalidInput`."""
    value = field(row, name, where)
    several = [value] if isinstance(value, str) else value
    if not isinstance(several, list) or not all(isinstance(text, str) and text.strip() for text in several):
        raise InvalidInput(f"{where}: {name!r} must be strings that are not empty, got {value!r}")
    return tuple(several)


def _rows(read: Callable[[dict[str, Any], str], TaskInput]) -> Callable[[Path], list[TaskInput]]:
    """A reader of JSONL files, from one of lines: `read(row, where)`."""

    def read_file(path: Path) -> list[TaskInput]:
        return [read(row, f"{path}, line {number}") for number, row in parse_jsonl(read_text(path), str(path))]

    return read_file


def _e2e(path: Path) -> list[TaskInput]:
    return [TaskInput(prompt=e.mr, references=e.references, completion=e.references[0]) for e in read_e2e(path)]


def _scitldr(row: dict[str, Any], where: str) -> TaskInput:
    references = texts_field(row, "target", where)
    abstract = " ".join(" ".join(texts_field(row, "source", where)).split())
    return TaskInput(prompt=f"{abstract}\nTL;DR:", references=references, completion=f" {references[0]}")


def _arxiv(row: dict[str, Any], where: str) -> TaskInput:
    title = text_field(row, "title", where)
    prompt = f"{text_field(row, 'abstract', where)}\nTitle:"
    return TaskInput(prompt=prompt, references=(title,), completion=f" {title}")


def _gsm8k(row: dict[str, Any], where: str) -> TaskInput:
    solution, mark, answer = text_field(row, "answer", where).rpartition("####")
    if not mark or not answer.strip():
        raise InvalidInput(f"{where}: 'answer' must end with '#### ' and the final number")
    worked = re.sub(r"<<.*?>>", "", solution)  # marks of a calculator, which nobody has at hand here
    prompt = f"Question: {text_field(row, 'question', where)}\nAnswer:"
    return TaskInput(prompt=prompt, references=(answer.strip(),), completion=f" {worked}####{answer}")


def _plain_text(path: Path) -> list[TaskInput]:
    text = read_text(path)
    if not text.strip():
        raise InvalidInput(f"{path} holds no text")
    return [TaskInput(prompt="", references=(), completion=text)]


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="e2e",
            file="testset_w_refs.csv",
            read=_e2e,
            metrics=("bleu", "nist", "rouge_l", "chrf", "slot_error_rate"),
            max_new_tokens=100,
        ),
        Task(
            name="scitldr",
            file="test.jsonl",
            read=_rows(_scitldr),
            metrics=("rouge_l", "chrf"),
            max_new_tokens=64,
            stop=("\n",),
        ),
        Task(
            name="arxiv_abstract_title",
            file="test.jsonl",
            read=_rows(_arxiv),
            metrics=("rouge_l", "chrf"),
            max_new_tokens=40,
            stop=("\n",),
        ),
        Task(
            name="gsm8k",
            file="test.jsonl",
            read=_rows(_gsm8k),
            metrics=("final_number",),
            max_new_tokens=256,
            stop=("\nQuestion:",),
        ),
        Task(
            name="lm",
            file="test.txt",
            read=_plain_text,
            metrics=("loss",),
            max_new_tokens=64,
            prefix_tokens=64,
        ),
    )
}
"""Tasks by name: E2E (data to text), SciTLDR (abstract to one sentence), arXiv (abstract to title), GSM8K (the final number),
and language modelling on plain text, where depth acts behind a prefix of each window."""

OWN_FIELDS = ("prompt", "references", "answer", "metric")


def read_own(path: Path, metrics: tuple[str, ...] | None) -> tuple[Task, list[TaskInput]]:
    """A JSONL file of one's own: `prompt`, `references` or `answer`, and `metric` (one, several, or given as `metrics`).

    Lines may leave `metric` out after the first one that has it, and may not change it. Raises `InvalidInput`.
    """
    inputs, found = [], metrics
    for number, row in parse_jsonl(read_text(path), str(path)):
        where = f"{path}, line {number}"
        for name in row:
            if name not in OWN_FIELDS and (near := nearest(name, OWN_FIELDS)).startswith("did"):
                raise InvalidInput(f"{where}: unknown field {name!r}, {near}")
        prompt = text_field(row, "prompt", where)
        if ("answer" in row) == ("references" in row):
            raise InvalidInput(
                f"{where}: give either 'references' or 'answer'; the line has {', '.join(map(repr, row))}"
            )
        references = texts_field(row, "answer" if "answer" in row else "references", where)
        if metrics is None and "metric" in row:
            named = texts_field(row, "metric", where)
            if found is not None and named != found:
                raise InvalidInput(
                    f"{where}: 'metric' is {row['metric']!r}, and was {', '.join(found)} before: one file, one choice"
                )
            try:
                for metric in named:
                    metric_named(metric)
            except InvalidInput as error:
                raise InvalidInput(f"{where}: {error}") from None
            found = named
        inputs.append(TaskInput(prompt=prompt, references=references, completion=references[0]))
    if inputs and found is None:
        raise InvalidInput(f"{path}: no line has the field 'metric'; put it there, or give --metric")
    return Task(
        name=str(path),
        file=path.name,
        read=lambda path: read_own(path, metrics)[1],
        metrics=found or (),
        max_new_tokens=64,
    ), inputs
