"""What a run leaves on disk: the state that it can resume from, and the checkpoint at its end."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

from shoal.depth.checkpoint import TunedDepth
from shoal.depth.layer_router import LayerRouter
from shoal.errors import InvalidInput


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
    output: Path, network: Any, tokenizer: transformers.PreTrainedTokenizerBase, beside: TunedDepth | LayerRouter
) -> None:
    """Write an ordinary Hugging Face checkpoint with what says how to run it beside it: `depth_plan.json`, or a router."""

    def fill(directory: Path) -> None:
        network.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        beside.save(directory)

    write_directory(output, fill)


def write_directory(output: Path, fill: Callable[[Path], None]) -> None:
    """A new directory `output` that `fill` writes into; it appears whole or not at all."""
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        fill(partial)
        partial.chmod(0o755)  # mkdtemp makes it private
        os.replace(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
