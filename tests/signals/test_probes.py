"""Probes in the pass equal the plain two-stage reference, in any company and chunks, and say what they cost."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

import reference
from made_probes import KINDS, random_probe
from shoal import DepthPlan, Engine, Guard, Probe, Sampling
from shoal.depth.plan import ALWAYS
from shoal.depth.shape import ModelShape
from shoal.errors import CheckpointError, InvalidInput, InvalidPrompt
from shoal.models.checkpoint import load_checkpoint
from shoal.models.decoder import Decoder
from shoal.models.executor import Executor
from shoal.models.graphs import GraphDecoder
from shoal.models.native.decoder import NativeDecoder
from shoal.signals.familiarity import familiar
from shoal.signals.probe import METADATA, ProbeSettings
from shoal.signals.reading import Prefix, ProbeReading, ProbeSet
from ways import WAYS, decoder_of

PROMPTS = [[5, 9, 200, 31, 7], [77], [1 + i % 250 for i in range(41)], [3, 4, 5, 6, 7, 8, 9, 10, 11]]
SHORT = Sampling(max_new_tokens=4, ignore_eos=True)


@pytest.fixture(params=WAYS)
def decoder_by(request: pytest.FixtureRequest, checkpoint: Path) -> Executor:
    """The decoder, each of the ways to run it."""
    return decoder_of(request.param, checkpoint)


def engine_over(decoder: Executor, **sizes: int) -> Engine:
    return Engine(decoder, cache_gib=0.1, **{"max_batch": 4, **sizes})


def all_probes(engine: Engine) -> list[Probe]:
    return [random_probe(engine, name, seed=seed) for seed, name in enumerate(KINDS)]


def stored_states(model: PreTrainedModel, prompt: list[int]) -> Tensor:
    """float32 [L + 1, T, d] as transformers has them: before each layer, and after the last without the final norm."""
    seen = []
    layers = model.model.layers
    hooks = [layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(lambda _, __, output: seen.append(output)))
    try:
        with torch.inference_mode():
            model(torch.tensor([prompt]))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat([one[0] if isinstance(one, tuple) else one for one in seen])


def expected(probe: Probe, states: Tensor) -> Tensor:
    """Probabilities [classes] by the reference."""
    ours = probe.settings
    _, logits = reference.probe_logits(
        states[: ours.num_levels],
        probe.tensors,
        ours.operator,
        pooling=ours.pooling,
        gate_scale=ours.gate_scale,
        heads=ours.heads,
    )
    return torch.cat((1 - logits.sigmoid(), logits.sigmoid())) if len(logits) == 1 else logits.softmax(dim=0)


@pytest.mark.parametrize("max_pass_tokens", [2048, 7])
def test_labels_are_those_of_the_reference(max_pass_tokens: int, decoder_by: Executor, model: PreTrainedModel) -> None:
    """Every kind in one pass, prompts whole and in chunks of 7 tokens, with other requests decoding beside them."""
    engine = engine_over(decoder_by, max_pass_tokens=max_pass_tokens)
    probes = all_probes(engine)
    generations = engine.generate(PROMPTS, SHORT, probes=probes)
    for prompt, generation in zip(PROMPTS, generations, strict=True):
        states = stored_states(model, prompt)
        assert generation.labels is not None
        assert list(generation.labels) == list(KINDS)
        for probe in probes:
            got = generation.labels[probe.settings.name]
            wanted = expected(probe, states)
            torch.testing.assert_close(
                torch.tensor(list(got.probabilities.values()), dtype=torch.float64), wanted, rtol=0, atol=1e-5
            )
            assert got.label == probe.settings.classes[int(wanted.argmax())]
            assert got.probe == probe.version


def test_each_operator_on_stored_tensors() -> None:
    """Padding counts for nothing: prompts of 3, 1 and 8 rows, padded to 8 with rubbish, as training reads them."""
    shape = ModelShape(
        num_layers=4, hidden_size=48, num_heads=2, num_kv_heads=2, head_dim=24, intermediate_size=48, gated_mlp=False,
        vocab_size=50,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    lengths = [3, 1, 8]
    x = torch.randn(5, 3, 8, 48, generator=generator)
    mask = torch.arange(8) < torch.tensor(lengths).unsqueeze(1)
    for name, kind in KINDS.items():
        if name == "lower levels":
            continue
        made = ProbeSettings(
            **{"name": name, "classes": ("a", "b"), "hidden_size": 48, "num_levels": 5, "shape": shape, **kind}
        )
        probe = Probe(
            made, {key: torch.randn(size, generator=generator) / 48**0.5 for key, size in made.sizes().items()}
        )
        vectors = probe.layer_stage(probe.token_stage(x, mask))
        for row, length in enumerate(lengths):
            vector, logits = reference.probe_logits(
                x[:, row, :length], probe.tensors, made.operator,
                pooling=made.pooling, gate_scale=made.gate_scale, heads=made.heads,
            )  # fmt: skip
            torch.testing.assert_close(vectors[row].double(), vector, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(probe.logits(vectors[row]).double(), logits, rtol=1e-5, atol=1e-5)


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_any_chunks_read_the_same(data: st.DataObject) -> None:
    """Of stored states, cut anywhere, several prompts in a pass: sums go on from chunk to chunk."""
    shape = ModelShape(
        num_layers=2, hidden_size=16, num_heads=2, num_kv_heads=2, head_dim=8, intermediate_size=32, gated_mlp=False,
        vocab_size=50,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    probes = []
    for name, kind in KINDS.items():
        kind = {key: value for key, value in kind.items() if key not in ("factor", "heads")}
        made = ProbeSettings(**{"name": name, "classes": ("a", "b"), "hidden_size": 16, "num_levels": 3, "shape": shape,
                                "factor": 4, "heads": 2, **kind})  # fmt: skip
        tensors = {key: torch.randn(size, generator=generator) / 16**0.5 for key, size in made.sizes().items()}
        tensors |= {"familiar_means": torch.zeros(2, 16), "familiar_scale": torch.eye(16)}
        probes.append(Probe(made, tensors | {"familiar_distances": torch.arange(20.0)}))
    observer = ProbeSet(probes)
    lengths = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
    prompts = [torch.randn(3, length, 16, generator=generator) for length in lengths]
    readings = [observer.begin(length) for length in lengths]
    done = [0] * len(prompts)
    while unread := [i for i, length in enumerate(lengths) if done[i] < length]:
        counts = [data.draw(st.integers(1, lengths[i] - done[i])) for i in unread]
        watch = observer.watch([readings[i] for i in unread], counts)
        for level in range(3):
            watch.see(
                level,
                torch.cat([prompts[i][level, done[i] : done[i] + n] for i, n in zip(unread, counts, strict=True)]),
            )
        watch.keep()
        for i, count in zip(unread, counts, strict=True):
            done[i] += count
    for states, reading in zip(prompts, readings, strict=True):
        for probe in probes:
            assert not isinstance(reading.findings, Exception)
            assert reading.findings is not None
            got = list(reading.findings.labels[probe.settings.name].probabilities.values())
            torch.testing.assert_close(torch.tensor(got).double(), expected(probe, states), rtol=0, atol=1e-5)


def test_the_papers_parameter_counts() -> None:
    """Its three backbones, section 4 and table 1: gate 92,160, 74.9k, 102k; attention 35.4, 27.0 and 26.2 M at factor 32, and
    283, 142, 71 and 18 M at 4, 8, 16 and 64 on the first; pooling 0.003 M for two classes, 0.018 M for six."""

    def count(num_layers: int, d: int, **kind: Any) -> int:
        shape = ModelShape(
            num_layers=num_layers, hidden_size=d, num_heads=1, num_kv_heads=1, head_dim=d, intermediate_size=d,
            gated_mlp=True, vocab_size=1,
        )  # fmt: skip
        made = ProbeSettings(
            **{
                "name": "p",
                "classes": ("a", "b"),
                "hidden_size": d,
                "num_levels": num_layers + 1,
                "shape": shape,
                **kind,
            }
        )
        probe = Probe(made, {key: torch.empty(size) for key, size in made.sizes().items()})
        return probe.num_parameters - made.num_logits * (d + 1)  # without the head, as the paper's tables have it

    attention = {"operator": "attention", "max_prompt_tokens": 512}
    backbones = {"Llama-3.2-3B": (28, 3072), "GPT-OSS-20B": (24, 2880), "Qwen3-30B-A3B": (48, 2048)}
    gates = {name: count(*sizes, operator="gate") for name, sizes in backbones.items()}
    assert gates == {"Llama-3.2-3B": 92_160, "GPT-OSS-20B": 74_880, "Qwen3-30B-A3B": 102_400}
    heads = {name: round(count(*sizes, **attention) / 1e6, 1) for name, sizes in backbones.items()}
    assert heads == {"Llama-3.2-3B": 35.4, "GPT-OSS-20B": 27.0, "Qwen3-30B-A3B": 26.2}
    factors = {factor: round(count(28, 3072, factor=factor, **attention) / 1e6) for factor in (4, 8, 16, 64)}
    assert factors == {4: 283, 8: 142, 16: 71, 64: 18}
    assert count(28, 3072, operator="pool") == 0


@pytest.mark.parametrize("kind", ["mean", "max", "gate", "sharp gate", "three classes"])
def test_prefix_then_rest_is_the_whole(kind: str, decoder: Executor, model: PreTrainedModel, tmp_path: Path) -> None:
    """What was read of a prefix is kept in a file, and another prompt goes on from it."""
    engine = engine_over(decoder)
    probe = random_probe(engine, kind)
    observer = engine.observer([probe])
    assert isinstance(observer, ProbeSet)
    states = stored_states(model, PROMPTS[2])

    def read(reading: ProbeReading, part: Tensor) -> None:
        watch = observer.watch([reading], [part.shape[1]])
        for level, here in enumerate(part):
            watch.see(level, here)
        watch.keep()

    first = observer.begin(30)
    read(first, states[:, :30])
    first.prefix().save(tmp_path / "prefix.safetensors")
    rest = observer.begin(41, Prefix.load(tmp_path / "prefix.safetensors"))
    assert rest.findings is None
    read(rest, states[:, 30:])
    assert rest.findings is not None
    assert not isinstance(rest.findings, Exception)
    got = list(rest.findings.labels[kind].probabilities.values())
    torch.testing.assert_close(torch.tensor(got).double(), expected(probe, states), rtol=0, atol=1e-5)
    assert rest.flops == 11 * observer.flops_per_token + observer.flops_at_the_end(41)  # others paid for the prefix
    other = ProbeSet([random_probe(engine, kind, seed=5)])
    with pytest.raises(InvalidInput, match="the prefix is of probes"):
        other.begin(41, first.prefix())
    with pytest.raises(InvalidInput, match="no more than that: 30"):
        observer.begin(30, first.prefix())


def test_attention_keeps_no_prefix(decoder: Executor) -> None:
    engine = engine_over(decoder)
    observer = engine.observer([random_probe(engine, "attention")])
    assert isinstance(observer, ProbeSet)
    reading = observer.begin(9)
    watch = observer.watch([reading], [3])
    for level in range(7):
        watch.see(level, torch.zeros(3, engine.shape.hidden_size))
    watch.keep()
    with pytest.raises(InvalidInput, match="use a pooling or gate probe"):
        reading.prefix()


def test_they_change_no_token_and_no_other_spending(decoder_by: Executor) -> None:
    """Some requests with probes, some without, some with others; alone or together their labels are the same to 1e-5."""
    engine, sampling = engine_over(decoder_by), replace(SHORT, logprobs=3)
    plain = engine.generate(PROMPTS, sampling)
    one, two = engine.observer([random_probe(engine, "gate")]), engine.observer([random_probe(engine, "max")])
    for prompt, observer in zip(PROMPTS, (one, None, two, one), strict=True):
        engine.add(prompt, sampling, probes=observer, index=PROMPTS.index(prompt))
    mixed = {chunk.index: chunk.generation for chunk in drained(engine) if chunk.generation}
    for index, without in enumerate(plain):
        assert mixed[index].token_ids == without.token_ids
        if isinstance(decoder_by, NativeDecoder):
            assert mixed[index].logprobs == without.logprobs, "a watched pass is the same to the last bit"
        assert replace(mixed[index].ledger, probe_flops=0) == without.ledger
        assert without.ledger.probe_flops == 0
    assert mixed[1].labels is None
    for index, observer in ((0, one), (2, two), (3, one)):
        assert mixed[index].ledger.probe_flops > 0
        (alone,) = engine.generate([PROMPTS[index]], SHORT, probes=observer)
        for name, label in (mixed[index].labels or {}).items():
            assert (alone.labels or {})[name].probabilities == pytest.approx(label.probabilities, abs=1e-5)


def drained(engine: Engine) -> list[Any]:
    chunks = []
    while engine.has_work:
        chunks += engine.step()
    return chunks


def test_flops_are_counted_where_they_run(decoder: Executor) -> None:
    """A gate: 2 d for w . x and 2 d for the sum per token and level; the same among levels; head and distance at the end."""
    engine = engine_over(decoder, max_pass_tokens=7)
    (generation,) = engine.generate([PROMPTS[2]], SHORT, probes=[random_probe(engine, "gate")])
    d, levels = engine.shape.hidden_size, engine.shape.num_layers + 1
    assert generation.ledger.probe_flops == 41 * levels * 4 * d + levels * 4 * d + 2 * d + 2 * d * (d + 2)
    engine.add(PROMPTS[2], SHORT, probes=[random_probe(engine, "gate")])
    engine.step()
    engine.cancel(1)
    (chunk,) = engine.step()
    assert chunk.generation.ledger.probe_flops == 7 * levels * 4 * d
    assert chunk.generation.labels is None


def test_labels_come_with_the_first_token(engine: Engine) -> None:
    probes = [random_probe(engine, "gate")]
    chunks = list(engine.stream(["abc", "defg"], SHORT, probes=probes))
    for index in (0, 1):
        first, *rest = [chunk for chunk in chunks if chunk.index == index]
        assert first.labels is not None
        assert len(first.token_ids) == 1
        assert all(chunk.labels is None for chunk in rest)
        assert rest[-1].generation is not None
        assert rest[-1].generation.labels == first.labels


def test_every_sample_is_labelled(engine: Engine) -> None:
    generations = engine.generate(
        "abc", Sampling(max_new_tokens=3, n=3, temperature=1), probes=[random_probe(engine, "gate")]
    )
    assert [list(generation.labels or ()) for generation in generations] == [["gate"]] * 3


def test_a_guard_stops_before_the_first_token(decoder_by: Executor) -> None:
    """The head ran and is paid for; slot and cache are free at once, and the company goes on."""
    engine = engine_over(decoder_by)
    probe = random_probe(engine, "gate")
    free = engine.generate(PROMPTS, SHORT, probes=[probe])
    shares = sorted((g.labels or {})["gate"].probabilities["yes"] for g in free)
    guard = Guard(probe=probe, stop_on=("yes",), threshold=(shares[1] + shares[2]) / 2)
    guarded = engine.generate(PROMPTS, SHORT, probes=[guard])
    for before, after in zip(free, guarded, strict=True):
        assert before.labels is not None
        assert after.labels is not None
        assert after.labels["gate"].probabilities == pytest.approx(before.labels["gate"].probabilities, abs=1e-5)
        if before.labels["gate"].probabilities["yes"] > shares[1]:
            assert (after.finish_reason, after.token_ids, after.text, after.blocked_by) == ("blocked", (), "", "gate")
            assert after.ledger.prompt_flops == before.ledger.prompt_flops
            assert after.ledger.decode_flops == 0
        else:
            assert after.token_ids == before.token_ids
            assert (after.finish_reason, after.blocked_by) == ("length", None)
    assert engine.runner.cache.blocks_in_use == 0
    by_label = engine.generate(PROMPTS, SHORT, probes=[Guard(probe=probe, stop_on=("no", "yes"))])
    assert {generation.finish_reason for generation in by_label} == {"blocked"}


def test_saved_loaded_and_given_as_files(engine: Engine, tmp_path: Path) -> None:
    probe = random_probe(engine, "attention")
    path = tmp_path / "attention.safetensors"
    probe.save(path)
    (tmp_path / "any").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "any").stat().st_mode)
    loaded = Probe.load(path)
    assert loaded.settings == probe.settings
    assert loaded.version == probe.version
    (by_file,) = engine.generate("abc", SHORT, probes=[path])
    (by_object,) = engine.generate("abc", SHORT, probes=[probe])
    assert by_file.labels == by_object.labels
    assert random_probe(engine, "attention", seed=1).version != probe.version
    (tmp_path / "other.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="holds no probe"):
        Probe.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        ({"familiar_means": None}, {}, "needs familiar_means"),
        ({"familiar_scale": torch.zeros(10, 3)}, {}, "needs familiar_scale"),
        ({"familiar_distances": torch.zeros(0)}, {}, "needs familiar_distances"),
        (
            {"head_bias": torch.zeros(1, dtype=torch.float16)},
            {},
            r"needs head_bias, torch.float32 \(1,\), got torch.float16",
        ),
        ({"head_bias": torch.zeros(1, dtype=torch.int64)}, {}, "got torch.int64"),
        ({}, {"hidden_size": 8}, "hidden_size of a probe must be the model's"),
        ({}, {"operator": "attention", "factor": 0, "max_prompt_tokens": 5}, "factor of a probe must be 1 to"),
        ({}, {"num_levels": "7"}, "num_levels of a probe must be a whole number"),
        ({}, {"name": 5}, "name of a probe must be a name"),
        ({}, {"classes": ["a", 5]}, "classes of a probe must be two names"),
        ({}, {"temperature": float("nan")}, "temperature of a probe must be above 0"),
        ({}, None, "is no mapping|not a mapping"),
    ],
)
def test_damaged_files_are_refused(
    tensors: dict[str, Any], settings: dict[str, Any] | None, message: str, engine: Engine, tmp_path: Path
) -> None:
    """When they are read, not when the first request comes."""
    probe, path = random_probe(engine, "gate"), tmp_path / "p.safetensors"
    held = {name: tensor for name, tensor in {**probe.tensors, **tensors}.items() if tensor is not None}
    said = None if settings is None else {**asdict(probe.settings), **settings}
    save_file(held, path, metadata={METADATA: json.dumps(said)})
    with pytest.raises(CheckpointError, match=message):
        Probe.load(path)


def test_what_is_refused(engine: Engine, make_engine: Callable[..., Engine]) -> None:
    gate, attention = random_probe(engine, "gate"), random_probe(engine, "attention")
    num_layers = engine.shape.num_layers
    shallow_prompt = DepthPlan((ALWAYS,) + (0,) * (num_layers - 1), prompt_layers=(0,))
    with pytest.raises(InvalidInput, match="give it no prompt_layers"):
        engine.generate("abc", SHORT, shallow_prompt, probes=[gate])
    with pytest.raises(
        InvalidPrompt, match="the prompt has 129 tokens, and probe 'attention' attends over at most 128"
    ):
        engine.generate([7] * 129, SHORT, probes=[attention])
    assert engine.generate([7] * 128, SHORT, probes=[attention])[0].labels
    with pytest.raises(InvalidInput, match="two probes are named 'gate'"):
        engine.generate("abc", SHORT, probes=[gate, random_probe(engine, "gate", seed=3)])
    for nonsense in (["gate", 3], "gate"):
        with pytest.raises((InvalidInput, CheckpointError)):
            engine.generate("abc", SHORT, probes=nonsense)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="threshold of a guard must be 0 to 1"):
        Guard(probe=gate, stop_on=("yes",), threshold="0.5")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="did you mean 'yes'"):
        Guard(probe=gate, stop_on=("yess",))
    other_shape = Probe(replace(gate.settings, shape=replace(gate.settings.shape, intermediate_size=5)), gate.tensors)
    with pytest.raises(InvalidInput, match="its intermediate_size is 5"):
        engine.generate("abc", SHORT, probes=[other_shape])
    other_weights = Probe(replace(gate.settings, fingerprint="0123"), gate.tensors)
    with pytest.raises(InvalidInput, match="trained on other weights of this shape"):
        engine.generate("abc", SHORT, probes=[other_weights])


def test_fingerprints_do_not_depend_on_dtype_or_shards(
    checkpoint: Path, model: PreTrainedModel, tmp_path: Path
) -> None:
    ours = load_checkpoint(checkpoint)[0].fingerprint
    assert ours
    assert {load_checkpoint(checkpoint, dtype=dtype)[0].fingerprint for dtype in ("bfloat16", "int8")} == {ours}
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert load_checkpoint(tmp_path / "shards")[0].fingerprint == ours
    with torch.no_grad():
        weight = model.model.layers[3].self_attn.o_proj.weight
        before = weight[0, 0].item()
        weight[0, 0] += 1
        model.save_pretrained(tmp_path / "changed")
        weight[0, 0] = before
    assert load_checkpoint(tmp_path / "changed")[0].fingerprint != ours


def test_graphs_leave_prompts_of_one_token_to_the_plain_path(checkpoint: Path) -> None:
    """Such a pass looks like a decode pass, but probes read its states."""
    by_graph = engine_over(GraphDecoder(*load_checkpoint(checkpoint)))
    plain = engine_over(Decoder(*load_checkpoint(checkpoint)))
    labels = [
        engine.generate([[77]], SHORT, probes=[random_probe(engine, "gate")])[0].labels for engine in (by_graph, plain)
    ]
    assert labels[0] == labels[1]
    assert labels[0]


def test_a_probe_that_is_not_finite_ends_its_request_alone(engine: Engine) -> None:
    probe = random_probe(engine, "gate")
    broken = Probe(probe.settings, {**probe.tensors, "head_bias": torch.tensor([torch.nan])})
    engine.add("abc", SHORT, probes=[broken], index=0)
    engine.add("abc", SHORT, probes=[probe], index=1)
    ended = {chunk.index: chunk.generation for chunk in drained(engine) if chunk.generation}
    assert ended[0].finish_reason == "error"
    assert "probe 'gate' made probabilities that are not finite" in (ended[0].error or "")
    assert ended[1].finish_reason == "length"


def test_a_router_reads_beside_them(decoder_by: Executor) -> None:
    from shoal.depth.first import FirstRouter

    engine = engine_over(decoder_by)
    shape = engine.shape
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(size, generator=generator) for name, size in FirstRouter.sizes(shape).items()}
    router, probe = FirstRouter(shape=shape, tensors=tensors), random_probe(engine, "gate")
    both = engine.generate(PROMPTS, SHORT, router, probes=[probe])
    assert [g.plan for g in both] == [g.plan for g in engine.generate(PROMPTS, SHORT, router)]
    dense = engine.generate(PROMPTS, SHORT, probes=[probe])
    assert [g.labels for g in both] == [g.labels for g in dense]


def test_low_precision_reads_the_same_label_nearly(checkpoint: Path) -> None:
    """bfloat16: the probabilities of sums over tokens differ by little more than the states do."""
    exact = engine_over(decoder_of("plain", checkpoint))
    rough = engine_over(decoder_of("plain", checkpoint, "bfloat16"))
    probes = [random_probe(exact, name) for name in ("mean", "gate")]
    for fine, coarse in zip(
        exact.generate(PROMPTS, SHORT, probes=probes), rough.generate(PROMPTS, SHORT, probes=probes), strict=True
    ):
        for name, label in (fine.labels or {}).items():
            assert (coarse.labels or {})[name].probabilities == pytest.approx(label.probabilities, abs=0.05)


def test_prompts_of_the_same_kind_are_familiar() -> None:
    """One in a hundred lies beyond 99% of those held out, though the training's own lie nearer: 48 values from 200 prompts."""
    generator = torch.Generator().manual_seed(0)

    def drawn(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(count) % 2
        return torch.randn(count, 48, generator=generator) + 2 * labels.unsqueeze(1), labels

    (vectors, labels), (held_out, _), (fresh, _) = drawn(200), drawn(400), drawn(4000)
    known = familiar(vectors, labels, held_out, 2)

    def beyond(vectors: Tensor) -> float:
        distances = torch.cdist(vectors @ known["familiar_scale"], known["familiar_means"] @ known["familiar_scale"])
        return float((distances.amin(dim=1) > known["familiar_distances"][990]).float().mean())

    assert beyond(vectors) <= 0.005
    assert 0.005 < beyond(fresh) < 0.02
    assert beyond(fresh + 3) > 0.9
