"""What depth gains in decoding on a GPU, beside what it could gain at most; and transformers with a static cache, compiled.

    python benchmarks/gpu.py --save               (one GPU, under 8 minutes: what no time is left for is named, not measured)
    python benchmarks/gpu.py --quick --device cpu

OPT's shapes in bfloat16 with random weights that are made on the device, tensor by tensor; both engines have the same ones. Greedy,
64 prompt + 64 new tokens, all rows at one clock, all variants one after the other in every round. Warm-up runs every variant once
whole, so that graphs are recorded and models compiled before anything is timed.
"""

from __future__ import annotations

import argparse
import gc
import time
import zlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, CompileConfig, OPTConfig, PreTrainedModel

from decode import counted
from gpu_tables import describe
from machine import Limits, conditions
from models import MODELS, random_prompts
from report import interleaved, paired, parser, print_json, rounded, save, spread
from samples import Sample, run_shoal, tokens_per_s
from served import decode_floor_s
from shoal import Dense, Engine, SkipDecode
from shoal.models.checkpoint import Checkpoint
from shoal.models.executor import make_decoder
from shoal.models.families import configure
from shoal.models.tensors import TensorFiles

DTYPE = torch.bfloat16
DEPTHS = (Fraction(1, 2), Fraction(1, 3), Fraction(1, 4), Fraction(1, 5))
PROMPT_TOKENS = NEW_TOKENS = 64
CASE_S, PEER_S = 20, 75
"""Seconds that a shape's first case, and compiling a peer for any, are expected to take."""
Run = dict[str, Any]
prompts_for = partial(random_prompts, num_tokens=PROMPT_TOKENS)


def opt(num_layers: int, hidden_size: int, num_heads: int) -> OPTConfig:
    """An OPT of these sizes, no token of which ends a completion."""
    return OPTConfig(
        num_hidden_layers=num_layers,
        hidden_size=hidden_size,
        word_embed_proj_dim=hidden_size,
        ffn_dim=4 * hidden_size,
        num_attention_heads=num_heads,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=1,
    )


SHAPES = {"OPT-125M": opt(12, 768, 12), "OPT-6.7B": opt(32, 4096, 32), "OPT-1.3B": opt(24, 2048, 32)}
"""In the order of measuring: the last is the one whose peer takes longest to compile."""
WITH_PEER = ("OPT-125M", "OPT-1.3B", "OPT-quick")


class RandomTensors:
    """Stands in for a checkpoint's files: a tensor's name decides its values, so whoever asks for it gets the same ones."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __contains__(self, name: str) -> bool:
        return True

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Values of about the size of a trained model's: those of norms 1, others of standard deviation 0.02."""
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=DTYPE, device=self.device)
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
        return 0.02 * torch.randn(shape, generator=generator, dtype=DTYPE, device=self.device)


def make_engine(config: OPTConfig, device: torch.device, options: argparse.Namespace) -> Engine:
    """Our engine over a model of random weights, read the way a checkpoint is."""
    canonical, family = configure(config.to_dict(), bytes_per_value=DTYPE.itemsize)
    files = cast(TensorFiles, RandomTensors(device))
    checkpoint = Checkpoint(config=canonical, family=family, files=files, prefix=family.prefix, dtype=DTYPE)
    most = max(options.batches)
    return Engine(
        make_decoder(canonical, checkpoint.weights(device)),
        max_batch=most,
        max_pass_tokens=most * PROMPT_TOKENS,  # all prompts in one pass, so that all rows share a clock
        cache_gib=0.1 if options.quick else 4,  # 33 slots of 128 positions of the largest take 2.1
    )


class Peer:
    """transformers: static cache, decode compiled with CUDA graphs for each batch size of its own."""

    def __init__(self, config: OPTConfig, device: torch.device) -> None:
        tensors = RandomTensors(device)
        with torch.device(device):
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors.read(name, tuple(parameter.shape)))
        self.device = device
        # On a CPU `generate` compiles nothing and would warn of this.
        self.compile = {"compile_config": CompileConfig(dynamic=False)} if device.type == "cuda" else {}

    def run(self, prompts: list[list[int]], new_tokens: int) -> Sample:
        """One batch; the prompt's time is that of a call for one token, since nothing waits for the device within a call."""
        first, _ = self._generate(prompts, 1)
        seconds, tokens = self._generate(prompts, new_tokens)
        return Sample(prompt_s=first, total_s=seconds, tokens=tokens)

    def _generate(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, list[list[int]]]:
        input_ids = torch.tensor(prompts, device=self.device)
        began = time.perf_counter()
        output = self.model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            cache_implementation="static",
            **self.compile,
        )
        tokens: list[list[int]] = output[:, input_ids.shape[1] :].tolist()  # waits for the device
        return time.perf_counter() - began, tokens


class DeviceLimits(Limits):
    """The device's: bandwidth of reading a large buffer or of copying it, and FLOP/s of a square product."""

    def __init__(self, device: torch.device, *, quick: bool) -> None:
        self.device = device
        self.buffer = torch.ones(2**16 if quick else 2**30, device=device)
        self.copy = torch.empty_like(self.buffer)
        self.square = torch.randn((64, 64) if quick else (8192, 8192), device=device).to(DTYPE)
        self.bandwidth = self.peak = 0.0

    def measure(self) -> None:
        """A few more readings of each; the best is kept."""
        flops = 2 * self.square.shape[0] ** 3
        for _ in range(5):
            read_s, copy_s = self._seconds(self.buffer.sum), self._seconds(partial(self.copy.copy_, self.buffer))
            self.bandwidth = max(self.bandwidth, self.buffer.nbytes / read_s, 2 * self.buffer.nbytes / copy_s)
            self.peak = max(self.peak, flops / self._seconds(partial(torch.mm, self.square, self.square)))

    def _seconds(self, call: Callable[[], object]) -> float:
        synchronize(self.device)
        began = time.perf_counter()
        call()
        synchronize(self.device)
        return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(conditions()["cpu"])


def measure_model(name: str, options: argparse.Namespace, limits: DeviceLimits, ends_at: float) -> Iterator[Run]:
    """A run per batch size: measured, or with the reason why it was not under `"skipped"`. Raises nothing."""
    device = limits.device
    config = SHAPES[name] if name in SHAPES else cast(OPTConfig, MODELS[name])
    engine: Engine | None = None
    peer: Peer | str = "not for this shape"
    case_s = CASE_S
    for batch in options.batches:
        case = {"device": device_name(device), "model": name, "dtype": "bfloat16", "batch": batch}
        left = ends_at - time.monotonic()
        if left < case_s:
            yield {"case": case, "skipped": f"it takes about {case_s:.0f} s and {left:.0f} are left"}
            continue
        try:
            engine = engine or make_engine(config, device, options)
            if name in WITH_PEER:
                peer = warm_peer(peer, config, batch, device, left=left - case_s)
            began = time.monotonic()
            yield {"case": case, **measure(engine, peer, batch, options, limits)}
            case_s = 1.5 * (time.monotonic() - began)  # the next one may be larger
        except Exception as error:  # whatever it is, the other cases are measured
            yield {"case": case, "skipped": one_line(error)}
    del engine, peer
    gc.collect()
    if device.type == "cuda":
        torch.compiler.reset()
        torch.cuda.empty_cache()


def warm_peer(peer: Peer | str, config: OPTConfig, batch: int, device: torch.device, *, left: float) -> Peer | str:
    """The peer, compiled for `batch`; or why there is none. `left`: seconds that it may take."""
    if left < PEER_S:
        return f"compiling takes about {PEER_S:.0f} s and {left:.0f} are left"
    try:
        peer = peer if isinstance(peer, Peer) else Peer(config, device)
        peer.run(prompts_for(config.vocab_size, num_prompts=batch), NEW_TOKENS)
    except Exception as error:  # no compiler, say; ours is measured all the same
        return one_line(error)
    return peer


def one_line(error: Exception) -> str:
    """An error's kind and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def measure(engine: Engine, peer: Peer | str, batch: int, options: argparse.Namespace, limits: DeviceLimits) -> Run:
    """All variants at one batch size."""
    shape = engine.shape
    prompts = prompts_for(shape.vocab_size, num_prompts=batch)
    plans = {"dense": Dense().plan(shape.num_layers)}
    for depth in DEPTHS:
        plans[f"depth {depth}"] = SkipDecode(depth=float(depth), horizon=NEW_TOKENS - 1).plan(shape.num_layers)
    variants: dict[str, Callable[[], Sample]] = {
        label: partial(run_shoal, engine, prompts, plan, NEW_TOKENS) for label, plan in plans.items()
    }
    if isinstance(peer, Peer):
        variants["transformers"] = partial(peer.run, prompts, NEW_TOKENS)
    interleaved(variants, 1)
    samples = interleaved(variants, options.rounds, between=limits.measure)

    sizes = {"prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "batch": batch}
    decoded = batch * (NEW_TOKENS - 1)
    dense = samples["dense"]
    costs = {label: plan.cost(shape, **sizes) for label, plan in plans.items()}
    floors = {label: decode_floor_s(plan, shape, limits, **sizes) for label, plan in plans.items()}
    rows = []
    for label, timed in samples.items():
        decode_s = spread([s.decode_s for s in timed])
        row: Run = {
            "variant": label,
            "prompt_s": spread([s.prompt_s for s in timed]),
            "decode_s": decode_s,
            "total_s": spread([s.total_s for s in timed]),
            "decode_tokens_per_s": tokens_per_s(decoded, decode_s),
            "decode_speedup": paired([s.decode_s for s in dense], [s.decode_s for s in timed]),
            "total_speedup": paired([s.total_s for s in dense], [s.total_s for s in timed]),
        }
        if label in plans:
            bound = floors["dense"] / floors[label]
            read = costs[label].decode_bytes / decode_s["median"]
            row |= counted(costs[label], costs["dense"], **sizes) | {
                "bytes_gb_per_s": rounded(read / 1e9),
                "bytes_over_bandwidth": rounded(read / limits.bandwidth),
                "time_over_floor": rounded(decode_s["median"] / floors[label]),
                "bound": rounded(bound),
                "gain_over_bound": rounded(row["decode_speedup"]["median"] / bound),
            }
        rows.append(row)
    beside: Run = {"without_peer": peer}
    if isinstance(peer, Peer):
        same = [a[0] == b[0] for a, b in zip(dense[0].tokens, samples["transformers"][0].tokens, strict=True)]
        beside = {"peer_compiled": bool(peer.compile), "same_first_tokens": rounded(sum(same) / batch)}
    return {
        "conditions": {**conditions(), "cuda": torch.version.cuda},
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "rounds": options.rounds,
        **limits.to_dict(),
        "variants": rows,
        **beside,
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--device", default="cuda")
    options.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    options.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    options.add_argument("--minutes", type=float, default=7.5, help="start no case that would end later")
    chosen = options.parse_args()
    ends_at = time.monotonic() + 60 * chosen.minutes
    if chosen.quick:
        chosen.models, chosen.batches, chosen.rounds = ["OPT-quick"], [1, 2], 2
    torch.set_num_threads(chosen.threads)
    limits = DeviceLimits(torch.device(chosen.device), quick=chosen.quick)
    runs = []
    for name in chosen.models:
        for run in measure_model(name, chosen, limits, ends_at):
            print(describe(run), end="\n\n", flush=True)
            if chosen.save and "skipped" not in run:
                save("gpu", [run])
            runs.append(run)
    print_json("gpu", runs)


if __name__ == "__main__":
    main()
