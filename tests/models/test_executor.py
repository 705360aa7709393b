"""Which decoder runs a checkpoint, with and without the kernel, and what each does with weights that are not numbers."""

from __future__ import annotations

import ctypes.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compared_runs import assert_same, engine_over, random_jobs, run
from families import save, tiny_model
from shoal import DepthPlan, Engine, Sampling
from shoal.depth.plan import ALWAYS
from shoal.errors import InvalidInput
from shoal.models import executor
from shoal.models.checkpoint import load_checkpoint
from shoal.models.decoder import Decoder
from shoal.models.executor import Executor, make_decoder
from shoal.models.native import library as native_library
from shoal.models.native.decoder import NativeDecoder
from ways import NO_KERNEL, WAYS, kernel, needs_kernel

GREEDY = Sampling(max_new_tokens=6, ignore_eos=True)
PROMPTS = [[5, 9, 30], [7] * 20, [61]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grouped queries, rotary positions, four layers."""
    return save(tiny_model("llama"), tmp_path_factory.mktemp("llama"))


def way_of(decoder: Executor) -> str:
    """Its name in `WAYS`."""
    if isinstance(decoder, NativeDecoder):
        return "native"
    return "plain" if decoder.native_attention is None else "native attention"


@needs_kernel
@pytest.mark.parametrize(
    ("dtype", "fast", "way"),
    [
        ("float32", False, "native"),
        ("float32", True, "native attention"),
        ("bfloat16", False, "native"),
        ("bfloat16", True, "native attention"),
        ("int8", False, "native"),
        ("int8", True, "native"),
        ("float16", False, "plain"),
        ("float16", True, "plain"),
    ],
)
def test_the_table(directory: Path, dtype: str, fast: bool, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By dtype, and by whether oneDNN is faster at it on this machine."""
    monkeypatch.setattr(executor, "has_fast_products", lambda dtype: fast)
    decoder = make_decoder(*load_checkpoint(directory, dtype=dtype))
    assert way_of(decoder) == way
    assert len(engine_over(decoder).generate(PROMPTS, GREEDY)[0].token_ids) == 6  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_without_the_kernel(directory: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch does everything; in float32 the tokens are the kernel's."""
    with monkeypatch.context() as patch:
        patch.setattr(executor, "library", lambda: None)
        engine = Engine.from_pretrained(directory, dtype=dtype, max_batch=7, max_pass_tokens=40, cache_gib=0.1)
    assert way_of(engine.runner.decoder) == "plain"
    assert engine.shape.bytes_per_weight == {"float32": 4, "int8": 1}.get(dtype, 2)
    jobs = random_jobs(4)
    got = run(engine, jobs)
    assert {g.finish_reason for g in got.generations} == {"length"}
    if dtype == "float32":
        expected = run(engine_over(make_decoder(*load_checkpoint(directory))), jobs)  # type: ignore[arg-type]
        assert_same(got, expected, bound=1e-4, near_ties=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_heads_that_the_kernel_does_not_take(dtype: str, tmp_path: Path) -> None:
    """12 values are no multiple of 8."""
    model = tiny_model("mistral", head_dim=12)
    engine = Engine.from_pretrained(save(model, tmp_path), dtype=dtype, cache_gib=0.1)
    assert way_of(engine.runner.decoder) == "plain"
    assert [len(g.token_ids) for g in engine.generate(PROMPTS, GREEDY)] == [6] * 3


def test_int8_is_for_cpus(directory: Path) -> None:
    with pytest.raises(InvalidInput, match="int8 runs on CPUs only, not on meta: choose bfloat16 or device='cpu'"):
        make_decoder(*load_checkpoint(directory, dtype="int8", device="meta"))


def test_a_library_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not there, not a library, another library, or a processor without AVX2: no kernel, and no error."""
    load = native_library.library.__wrapped__
    (tmp_path / "garbage.so").write_bytes(b"not a library")
    for path in (tmp_path / "none.so", tmp_path / "garbage.so", Path(ctypes.util.find_library("m") or "libm.so.6")):
        monkeypatch.setattr(native_library, "LIBRARY", path)
        assert load() is None
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert load() is None


@pytest.mark.parametrize("place", ["qkv", "attention_norm", "down", "head", "final_norm"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("way", WAYS)
def test_a_weight_that_is_not_a_number(directory: Path, way: str, dtype: str, place: str) -> None:
    """Each request that meets it ends with an error; one that skips its layer goes on as if it were alone."""
    config, weights = load_checkpoint(directory, dtype=dtype)
    layers = list(weights.layers)
    weights = replace(weights, layers=layers)
    broken = getattr(layers[1] if hasattr(layers[1], place) else weights, place).weight
    if way != "plain" and native_library.library() is None:
        pytest.skip(NO_KERNEL)
    skipping = DepthPlan((ALWAYS, 0, ALWAYS, ALWAYS), prompt_layers=(0, 2, 3))

    def engine() -> Engine:
        if way == "native":
            return Engine(NativeDecoder(config, weights, kernel()), cache_gib=0.1)
        return Engine(Decoder(config, weights, kernel() if way == "native attention" else None), cache_gib=0.1)

    healthy = engine().generate(PROMPTS[0], GREEDY, skipping)[0]
    broken.view(-1)[3] = torch.nan
    ill = engine()
    generations = ill.generate([PROMPTS[0], *PROMPTS], GREEDY, [skipping, *[DepthPlan((ALWAYS,) * 4)] * 3])
    assert [g.finish_reason for g in generations[1:]] == ["error"] * 3
    assert all("logits are not finite" in str(g.error) for g in generations[1:])
    if place in ("head", "final_norm"):
        assert generations[0].finish_reason == "error"
    else:
        assert generations[0].finish_reason == "length"
        if dtype == "float32" or way == "native":  # PyTorch's other dtypes round by the number of rows
            assert generations[0].token_ids == healthy.token_ids
    assert ill.runner.cache.blocks_in_use == 0
    ill.runner.cache.check_integrity()
