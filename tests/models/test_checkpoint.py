"""Checkpoints as they are found: config styles, shards, names, dtypes; and what a broken one is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from families import CONFIGS, VARIANTS, edit_json, save, tiny_model
from shoal.errors import CheckpointError, InvalidInput, PickledCheckpoint, UnsupportedArchitecture
from shoal.models.checkpoint import Checkpoint, load_checkpoint, load_tokenizer
from shoal.models.weights import DecoderConfig

WEIGHTS = "model.safetensors"


def load(directory: Path, **options: Any) -> tuple[DecoderConfig, dict[str, Tensor]]:
    """The config, and every weight by a name of its own."""
    config, weights = load_checkpoint(directory, **options)
    return config, dict(flatten(weights))


def flatten(part: Any, name: str = "") -> list[tuple[str, Tensor]]:
    if isinstance(part, Tensor):
        return [(name, part)]
    if is_dataclass(part):
        return [leaf for f in fields(part) for leaf in flatten(getattr(part, f.name), f"{name}.{f.name}")]
    if part is None:
        return []
    return [leaf for index, item in enumerate(part) for leaf in flatten(item, f"{name}.{index}")]


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint per family; tests that change one copy it first."""
    return {family: save(tiny_model(family), tmp_path_factory.mktemp(family)) for family in CONFIGS}


@pytest.fixture
def copy(saved: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda family: Path(shutil.copytree(saved[family], tmp_path / family))


# --- As they are found ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_of_transformers_4_says_the_same(variant: str, tmp_path: Path) -> None:
    family, options = VARIANTS[variant]
    model = tiny_model(family, **options)
    new, _ = load(save(model, tmp_path / "5", style=5))
    old, _ = load(save(model, tmp_path / "4", style=4))
    raw = json.loads((tmp_path / "4" / "config.json").read_text())
    assert "torch_dtype" in raw
    assert not {"dtype", "rope_parameters", "layer_types"} & raw.keys()
    assert old == new


@pytest.mark.parametrize("family", CONFIGS)
def test_shards(family: str, saved: dict[str, Path], tmp_path: Path) -> None:
    save(tiny_model(family), tmp_path, shard_size="40KB")
    assert not (tmp_path / WEIGHTS).exists()
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    config, weights = load(tmp_path)
    expected_config, expected = load(saved[family])
    assert config == expected_config
    assert_same(weights, expected)


@pytest.mark.parametrize("family", CONFIGS)
def test_names_of_the_bare_model(family: str, saved: dict[str, Path], copy: Callable[[str], Path]) -> None:
    """Checkpoints of the bare model leave the prefix out, whole (`wte`) or in part (`decoder.embed_tokens`)."""
    prefix = {"gpt2": "transformer.", "gpt_neox": "gpt_neox."}.get(family, "model.")
    directory = copy(family)
    tensors = load_file(directory / WEIGHTS)
    assert any(name.startswith(prefix) for name in tensors)
    save_file({name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, directory / WEIGHTS)
    assert_same(load(directory)[1], load(saved[family])[1])


def test_tables_and_heads_of_old_checkpoints(saved: dict[str, Path], copy: Callable[[str], Path]) -> None:
    """Pythia's head has had two names, and its files hold masks and frequencies; GPT-2's hold masks and the tied head."""
    directory = copy("gpt_neox")
    tensors = load_file(directory / WEIGHTS)
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    tensors["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    tensors["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
    tensors["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, directory / WEIGHTS)
    assert_same(load(directory)[1], load(saved["gpt_neox"])[1])

    directory = copy("gpt2")
    tensors = load_file(directory / WEIGHTS)
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, directory / WEIGHTS)
    assert_same(load(directory)[1], load(saved["gpt2"])[1])


@pytest.mark.parametrize(("family", "tied"), [("qwen2", True), ("qwen2", False), ("opt", True), ("opt", False)])
def test_a_tied_head_is_the_embedding_itself(family: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_model(family, tie_word_embeddings=tied)
    _, weights = load_checkpoint(save(model, tmp_path))
    assert (weights.head.weight is weights.embedding) == tied
    assert torch.equal(weights.head.weight, model.get_output_embeddings().weight)
    assert Checkpoint.open(tmp_path).check() == sum(parameter.numel() for parameter in model.parameters())


STORED = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("asked", ["auto", "float32", "bfloat16", "float16"])
def test_dtypes(stored: torch.dtype, asked: str, tmp_path: Path) -> None:
    """`auto` is the dtype of the stored weights, whatever config.json says."""
    directory = save(tiny_model("gpt_neox"), tmp_path, dtype=stored)
    edit_json(directory / "config.json", dtype="float32")
    config, weights = load(directory, dtype=asked)
    expected = stored if asked == "auto" else getattr(torch, asked)
    assert {tensor.dtype for tensor in weights.values()} == {expected}
    assert config.shape.bytes_per_value == expected.itemsize
    original = load_file(directory / WEIGHTS)["gpt_neox.embed_in.weight"]
    assert torch.equal(weights[".embedding"], original.to(expected))


def test_end_tokens_of_generation_config_win(saved: dict[str, Path], copy: Callable[[str], Path]) -> None:
    directory = copy("llama")
    assert load(directory)[0].eos_token_ids == (256,)
    edit_json(directory / "generation_config.json", eos_token_id=[256, 260])
    assert load(directory)[0].eos_token_ids == (256, 260)


def test_layers_are_read_one_by_one(saved: dict[str, Path]) -> None:
    """No layer exists before it is asked for, so that whoever packs each and drops it never holds two copies."""
    _, weights = load_checkpoint(saved["llama"])
    layers = iter(weights.layers)
    next(layers)
    assert len(list(layers)) == 3
    assert list(layers) == []


def test_tokenizer(saved: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(saved["llama"])
    assert tokenizer.decode(tokenizer("Crème").input_ids) == "Crème"


def test_hub_id(saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub id is looked up in Hugging Face's cache when there is no network; a revision names one of its snapshots."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--tiny"
    for branch, family in {"main": "llama", "other": "qwen2"}.items():
        commit = str(len(branch)) * 40
        shutil.copytree(saved[family], repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
    assert load_checkpoint("someone/tiny")[0].family == "llama"
    assert load_checkpoint("someone/tiny", revision="other")[0].family == "qwen2"
    with pytest.raises(CheckpointError, match="no such directory: someone/else; and no model of that name"):
        load_checkpoint("someone/else")
    with pytest.raises(CheckpointError, match="at revision v9"):
        load_checkpoint("someone/tiny", revision="v9")


def test_a_directory_wins_over_the_hub(saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(saved["opt"], tmp_path / "someone" / "tiny")
    monkeypatch.chdir(tmp_path)
    assert load_checkpoint("someone/tiny")[0].family == "opt"


# --- What a broken one is told ----------------------------------------------------------------------------------------


def rewrite(directory: Path, **changes: Tensor | None) -> None:
    """Replace or (None) remove tensors of a checkpoint; `__` stands for a dot."""
    tensors = load_file(directory / WEIGHTS)
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        del tensors[name]
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, directory / WEIGHTS)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def add_tensor(directory: Path, name: str) -> None:
    save_file({**load_file(directory / WEIGHTS), name: torch.zeros(2)}, directory / WEIGHTS)


def shard(directory: Path) -> None:
    save(tiny_model("llama"), directory, shard_size="40KB")
    (directory / WEIGHTS).unlink()


def pickle_only(directory: Path) -> None:
    torch.save(load_file(directory / WEIGHTS), directory / "pytorch_model.bin")
    (directory / WEIGHTS).unlink()


BROKEN: dict[str, tuple[Callable[[Path], object], type[Exception], list[str]]] = {
    "no directory": (shutil.rmtree, CheckpointError, ["no such directory", "llama"]),
    "no config": (lambda d: (d / "config.json").unlink(), CheckpointError, ["has no config.json"]),
    "config not JSON": (lambda d: cut(d / "config.json", 50), CheckpointError, ["config.json is not valid JSON"]),
    "config not UTF-8": (lambda d: (d / "config.json").write_bytes(b'{"a": "\xff"}'), CheckpointError, ["config.json"]),
    "config not an object": (lambda d: (d / "config.json").write_text("[]"), CheckpointError, ["not a JSON object"]),
    "field of another type": (
        lambda d: edit_json(d / "config.json", hidden_size="wide"),
        CheckpointError,
        ["config.json", "hidden_size", "'wide'"],
    ),
    "head groups": (
        lambda d: edit_json(d / "config.json", num_key_value_heads=4),
        CheckpointError,
        ["6 attention heads", "4 key/value heads"],
    ),
    "no layers": (
        lambda d: edit_json(d / "config.json", num_hidden_layers=0),
        CheckpointError,
        ["config.json", "must be 1 or more"],
    ),
    "incomplete rope scaling": (
        lambda d: edit_json(d / "config.json", rope_parameters={"rope_type": "linear", "rope_theta": 1e4}),
        CheckpointError,
        ["config.json", "rope_parameters", "factor"],
    ),
    "odd rotary part": (
        lambda d: edit_json(d / "config.json", head_dim=9),
        CheckpointError,
        ["config.json", "even rotary dimension", "9"],
    ),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), CheckpointError, ["holds no weights", WEIGHTS]),
    "pickle only": (pickle_only, PickledCheckpoint, ["pytorch_model.bin", "shoal convert"]),
    "truncated": (lambda d: cut(d / WEIGHTS, 40_000), CheckpointError, [WEIGHTS, "truncated"]),
    "truncated header": (lambda d: cut(d / WEIGHTS, 100), CheckpointError, [WEIGHTS, "truncated"]),
    "empty file": (lambda d: cut(d / WEIGHTS, 0), CheckpointError, [WEIGHTS, "truncated"]),
    "corrupt": (lambda d: (d / WEIGHTS).write_bytes(bytes(range(256)) * 99), CheckpointError, [WEIGHTS, "corrupt"]),
    "git-lfs pointer": (
        lambda d: (d / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 9\n"),
        CheckpointError,
        [WEIGHTS, "git-lfs pointer"],
    ),
    "missing shard": (
        lambda d: (shard(d), min(d.glob("model-00002*")).unlink()),
        CheckpointError,
        ["model-00002-of-", "is missing", "model.safetensors.index.json"],
    ),
    "truncated shard": (
        lambda d: (shard(d), cut(min(d.glob("model-00002*")), 2000)),
        CheckpointError,
        ["model-00002-of-", "truncated"],
    ),
    "index without a map": (
        lambda d: (shard(d), (d / "model.safetensors.index.json").write_text("{}")),
        CheckpointError,
        ["model.safetensors.index.json", "weight_map"],
    ),
    "missing tensor": (
        lambda d: rewrite(d, model__layers__2__mlp__down_proj__weight=None),
        CheckpointError,
        ["model.layers.2.mlp.down_proj.weight is missing", "(48, 76)"],
    ),
    "missing embedding": (
        lambda d: rewrite(d, model__embed_tokens__weight=None),
        CheckpointError,
        ["model.embed_tokens.weight is missing"],
    ),
    "missing head": (lambda d: rewrite(d, lm_head__weight=None), CheckpointError, ["lm_head.weight is missing"]),
    "mis-shaped tensor": (
        lambda d: rewrite(d, model__layers__1__self_attn__k_proj__weight=torch.zeros(24, 48)),
        CheckpointError,
        [WEIGHTS, "model.layers.1.self_attn.k_proj.weight", "(24, 48)", "(16, 48)"],
    ),
    "another vocabulary": (
        lambda d: edit_json(d / "config.json", vocab_size=300),
        CheckpointError,
        ["model.embed_tokens.weight", "(263, 48)", "(300, 48)"],
    ),
    "fewer layers in the config": (
        lambda d: edit_json(d / "config.json", num_hidden_layers=3),
        CheckpointError,
        ["no place for", "model.layers.3.", "and 8 more"],
    ),
    "an adapter": (lambda d: add_tensor(d, "lora_A.weight"), CheckpointError, ["no place for", "lora_A.weight"]),
    "quantised tensor": (
        lambda d: rewrite(d, model__layers__0__mlp__up_proj__weight=torch.zeros(76, 48, dtype=torch.int8)),
        CheckpointError,
        ["model.layers.0.mlp.up_proj.weight", "int8", "quantised"],
    ),
    "double precision": (
        lambda d: rewrite(d, model__embed_tokens__weight=torch.zeros(263, 48, dtype=torch.float64)),
        CheckpointError,
        ["float64", "choose a dtype"],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoint(case: str, copy: Callable[[str], Path]) -> None:
    breaks, error_type, words = BROKEN[case]
    directory = copy("llama")
    breaks(directory)
    with pytest.raises(error_type) as caught:
        load_checkpoint(directory)
    for word in words:
        assert word in str(caught.value)


def test_mixed_dtypes_load(copy: Callable[[str], Path]) -> None:
    """Norms kept in float32 beside bfloat16 matrices are cast like everything else."""
    directory = copy("llama")
    rewrite(directory, model__embed_tokens__weight=torch.zeros(263, 48, dtype=torch.bfloat16))
    assert {tensor.dtype for tensor in load(directory)[1].values()} == {torch.bfloat16}


def test_a_file_is_no_checkpoint(saved: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="is a file: give the directory"):
        load_checkpoint(saved["opt"] / WEIGHTS)


def test_unknown_dtype_and_device(saved: dict[str, Path]) -> None:
    with pytest.raises(InvalidInput, match="unknown dtype 'bfloat': did you mean 'bfloat16'"):
        load_checkpoint(saved["opt"], dtype="bfloat")
    with pytest.raises(InvalidInput, match="device 'warp' cannot be used"):
        load_checkpoint(saved["opt"], device="warp")


def test_no_tokenizer(copy: Callable[[str], Path]) -> None:
    directory = copy("opt")
    (directory / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer: expected one of tokenizer\.json"):
        load_tokenizer(directory)


def test_broken_tokenizer(copy: Callable[[str], Path]) -> None:
    directory = copy("opt")
    cut(directory / "tokenizer.json", 100)
    with pytest.raises(CheckpointError, match=r"tokenizer in .* cannot be read"):
        load_tokenizer(directory)


REFUSED: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "post-norm OPT": ("opt", {"do_layer_norm_before": False}, ["opt", "do_layer_norm_before = False"]),
    "projected OPT": ("opt", {"word_embed_proj_dim": 24}, ["word_embed_proj_dim = 24", "hidden_size = 48"]),
    "OPT without a final norm": ("opt", {"_remove_final_layer_norm": True}, ["_remove_final_layer_norm"]),
    "plain OPT norms": ("opt", {"layer_norm_elementwise_affine": False}, ["layer_norm_elementwise_affine"]),
    "GPT-2 scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx"]),
    "GPT-2 unscaled": ("gpt2", {"scale_attn_weights": False}, ["scale_attn_weights"]),
    "GPT-2 with cross-attention": ("gpt2", {"add_cross_attention": True}, ["add_cross_attention"]),
    "an activation": ("gpt2", {"activation_function": "quick_gelu"}, ["'quick_gelu'", "gelu_new"]),
    "YaRN": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
        ["'yarn'", "llama3"],
    ),
    "dynamic scaling": (
        "qwen2",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        ["'dynamic'", "linear"],
    ),
    "rope by type of layer": (
        "qwen3",
        {
            "layer_types": ["full_attention"] * 4,
            "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
        },
        ["rope_parameters without 'rope_theta'"],
    ),
    "another type of layer": ("qwen3", {"layer_types": ["linear_attention"] * 4}, ["linear_attention"]),
    "a quantised model": (
        "llama",
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
        ["quantization_config"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_without_an_effect_here_are_refused_by_name(case: str, copy: Callable[[str], Path]) -> None:
    family, options, words = REFUSED[case]
    directory = copy(family)
    edit_json(directory / "config.json", **options)
    with pytest.raises(UnsupportedArchitecture) as caught:
        load_checkpoint(directory)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("model_type", ["mamba", "bert", "made_up", None])
def test_other_architectures_are_refused_with_the_list(model_type: str | None, copy: Callable[[str], Path]) -> None:
    directory = copy("llama")
    edit_json(directory / "config.json", model_type=model_type, architectures=["SomethingForCausalLM"])
    with pytest.raises(UnsupportedArchitecture) as caught:
        load_checkpoint(directory)
    for word in (repr(model_type), "SomethingForCausalLM", *CONFIGS):
        assert word in str(caught.value)
