"""`shoal convert`: pickled checkpoints come out as safetensors, whole or not at all, and no code in them runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from families import CONFIGS, save, tiny_model
from shoal import Engine, Sampling
from shoal.errors import CheckpointError, InvalidInput, PickledCheckpoint, UnsupportedArchitecture
from shoal.models.checkpoint import load_checkpoint
from shoal.models.convert import convert_checkpoint


def save_pickled(model: PreTrainedModel, directory: Path, *, shards: int = 1, old_format: bool = False) -> Path:
    """A checkpoint as they were before safetensors: the tied head is in the file, sharing the embedding's memory."""
    save(model, directory)
    (directory / "model.safetensors").unlink()
    state = model.state_dict()
    if shards == 1:
        torch.save(state, directory / "pytorch_model.bin", _use_new_zipfile_serialization=not old_format)
        return directory
    weight_map = {}
    for shard in range(shards):
        file = f"pytorch_model-{shard + 1:05}-of-{shards:05}.bin"
        part = {name: tensor for index, (name, tensor) in enumerate(state.items()) if index % shards == shard}
        torch.save(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", CONFIGS)
def test_the_same_model_comes_out(family: str, shards: int, tmp_path: Path) -> None:
    model = tiny_model(family)
    source = save_pickled(model, tmp_path / "pickled", shards=shards)
    with pytest.raises(PickledCheckpoint, match="shoal convert"):
        load_checkpoint(source)
    converted = convert_checkpoint(source, tmp_path / "new" / "converted")
    assert len(list(converted.glob("*.safetensors"))) == shards
    assert not list(converted.glob("*.bin*"))
    direct = save(model, tmp_path / "direct")
    sampling = Sampling(max_new_tokens=8)
    got, expected = (Engine.from_pretrained(d).generate("Take it", sampling)[0] for d in (converted, direct))
    assert got.token_ids == expected.token_ids
    assert type(model).from_pretrained(converted).state_dict().keys() == model.state_dict().keys()


def test_old_pickles_and_shared_tensors(tmp_path: Path) -> None:
    """Files from before torch 1.6 cannot be mapped; a head that shares the embedding untied is written out of its own."""
    model = tiny_model("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    source = save_pickled(model, tmp_path / "pickled", old_format=True)
    _, weights = load_checkpoint(convert_checkpoint(source, tmp_path / "new"))
    assert torch.equal(weights.head.weight, weights.embedding)
    assert weights.head.weight is not weights.embedding


class Payload:
    """Would create a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.touch, (self.path,)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    source = save_pickled(tiny_model("opt"), tmp_path / "pickled")
    torch.save({"a": Payload(tmp_path / "ran")}, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="not a pickle of tensors alone"):
        convert_checkpoint(source, tmp_path / "new")
    assert not (tmp_path / "ran").exists()
    torch.load(source / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "ran").exists(), "the payload works, so its absence above meant something"


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    source = save_pickled(tiny_model("opt"), tmp_path / "pickled")
    (tmp_path / "new").mkdir()
    with pytest.raises(InvalidInput, match="exists: choose a new directory"):
        convert_checkpoint(source, tmp_path / "new")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


BROKEN: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "truncated": (lambda d: truncate(d / "pytorch_model.bin"), CheckpointError, "truncated or corrupt"),
    "empty": (lambda d: (d / "pytorch_model.bin").write_bytes(b""), CheckpointError, "truncated or corrupt"),
    "a list": (lambda d: torch.save([1], d / "pytorch_model.bin"), CheckpointError, "not a flat table of tensors"),
    "no weights": (lambda d: (d / "pytorch_model.bin").unlink(), CheckpointError, "holds no pickled weights"),
    "a tensor missing": (
        lambda d: torch.save({"model.decoder.embed_tokens.weight": torch.zeros(263, 48)}, d / "pytorch_model.bin"),
        CheckpointError,
        "model.decoder.embed_positions.weight is missing",
    ),
    "missing shard": (
        lambda d: (
            (d / "pytorch_model.bin").unlink(),
            (d / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "b.bin"}}'),
        ),
        CheckpointError,
        "b.bin is missing",
    ),
    "safetensors": (
        lambda d: (d / "pytorch_model.bin").rename(d / "model.safetensors"),
        CheckpointError,
        "holds safetensors already",
    ),
    "another architecture": (
        lambda d: (d / "config.json").write_text('{"model_type": "mamba"}'),
        UnsupportedArchitecture,
        "supported: gpt2",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_converted_leaves_nothing_behind(case: str, tmp_path: Path) -> None:
    breaks, error_type, words = BROKEN[case]
    source = save_pickled(tiny_model("opt"), tmp_path / "pickled")
    breaks(source)
    with pytest.raises(error_type, match=words):
        convert_checkpoint(source, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["pickled"]
