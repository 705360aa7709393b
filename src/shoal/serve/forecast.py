"""What a request would cost, before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shoal.depth.plan import Dense
from shoal.engine.engine import Engine
from shoal.engine.request import Request
from shoal.serve.errors import ApiError
from shoal.serve.replies import layers_of

MAX_LISTED = 4096
"""Tokens whose layers are listed."""


def forecast(engine: Engine, requests: Sequence[Request]) -> dict[str, Any]:
    """Layers, FLOPs, cache and seconds of a request that emits all that it may, alone, beside those of every layer.

    Seconds come from the engine's step-time model; null while it has not seen passes like these. Raises `ApiError` for several:
    what they take together depends on who else runs.
    """
    if len(requests) > 1:
        param = "n" if requests[-1].sample else "prompt"
        raise ApiError(400, f"{param}: a plan is of one completion, this body asks for {len(requests)}", param=param)
    (request,) = requests
    shape, bytes_per_block = engine.shape, engine.runner.cache.bytes_per_block
    plan, dense = request.plan, Dense().plan(engine.shape.num_layers)
    sizes = {"prompt_tokens": len(request.prompt), "new_tokens": request.sampling.max_new_tokens}
    ours, every = plan.cost(shape, **sizes), dense.cost(shape, **sizes)
    return {
        "object": "plan",
        "prompt_tokens": sizes["prompt_tokens"],
        "max_tokens": sizes["new_tokens"],
        "num_layers": shape.num_layers,
        "layers": layers_of(plan, 0, min(sizes["new_tokens"], MAX_LISTED)),
        "mean_layers": round(ours.mean_layers, 3),
        "plan": plan.to_dict(),
        "layer_tokens": ours.layer_tokens,
        "dense_layer_tokens": every.layer_tokens,
        "flops": ours.flops,
        "dense_flops": every.flops,
        "cache_bytes": ours.peak_cache_blocks * bytes_per_block,
        "dense_cache_bytes": every.peak_cache_blocks * bytes_per_block,
        "seconds": engine.step_time.forecast(plan, **sizes),
        "dense_seconds": engine.step_time.forecast(dense, **sizes),
    }
