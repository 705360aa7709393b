"""The server that `shoal serve` runs, in a process of its own that also answers the benchmark: forecasts, waves or none, what ran.

`python serve_process.py CHECKPOINT DTYPE SLOTS THREADS`; its first line says its port, then every line in is a request and every
line out its answer (`ServerProcess.ask`).
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shoal.depth.plan import ALWAYS, DepthPlan
from shoal.depth.policies import policy_at
from shoal.engine.engine import Engine
from shoal.engine.scheduler import entry_passes, fill_level
from shoal.engine.step_time import Courses

MODEL = "served"
MAX_PASS_TOKENS = 512
"""As `shoal serve` has it."""
CYCLES = 4
"""Of full slots, that a forecast runs."""


def main() -> None:
    """Serve until standard input ends."""
    import uvicorn

    from shoal.cli.serve import listen
    from shoal.serve.app import make_app
    from shoal.serve.config import ServeConfig

    checkpoint, dtype, slots, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    engine = Engine.from_pretrained(
        checkpoint, dtype=dtype, threads=threads, max_batch=slots, max_pass_tokens=MAX_PASS_TOKENS, cache_gib=2
    )
    app = make_app(engine, ServeConfig(model=MODEL, max_queue=4096))
    with listen("127.0.0.1", 0) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, log_level="warning", access_log=False))

        def answer() -> None:
            print(json.dumps({"port": listening.getsockname()[1]}), flush=True)
            for line in sys.stdin:
                print(json.dumps(reply(engine, json.loads(line))), flush=True)
            server.should_exit = True

        threading.Thread(target=answer, daemon=True).start()
        server.run(sockets=[listening])


def reply(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    """What the benchmark asks while no request runs."""
    while engine.has_work:
        time.sleep(0.01)
    if "forecast" in request:
        return forecast(engine, **request["forecast"])
    engine.runner.scheduler.waves = request.get("waves", True)
    stats = engine.stats
    return {
        "pass_s": stats.prompt_s + stats.decode_s,
        "passes": stats.prompt_passes + stats.decode_passes,
        "cpu_s": time.process_time(),
        "relative_error": engine.step_time.relative_error,
        "prices_s": engine.step_time.prices,
        "executor": type(engine.runner.decoder).__name__,
    }


def forecast(
    engine: Engine,
    *,
    depths: Sequence[float],
    prompt_tokens: int,
    new_tokens: int,
    waves: bool = True,
    staggered: bool = False,
) -> dict[str, Any]:
    """What the step-time model expects where more requests wait than there are slots: seconds until as many as there are slots have
    been served, prompts included.

    All requests wait at first, or, `staggered`, the slots are full of rows that are evenly spread; then requests enter when the
    scheduler would let them. Counted is what `2 * CYCLES` fillings of all slots take beyond `CYCLES`, so that beginning and end are
    left out.
    """
    num_slots, num_layers = engine.runner.cache.num_slots, engine.shape.num_layers
    plans = [
        policy_at("skipdecode", depth).plan(num_layers, prompt_tokens=prompt_tokens, max_new_tokens=new_tokens)
        for depth in depths
    ]
    level, dense = num_slots - 1, any(min(plan.cutoffs) == ALWAYS for plan in plans)
    # Passes done; one slot is free, so that the scheduler has to decide.
    running = [new_tokens * place // num_slots for place in range(num_slots - 1)] if staggered else []
    if waves and running and not dense:
        level = fill_level(
            courses(plans, running, 2 * num_slots, prompt_tokens, new_tokens), len(running), num_slots, engine.step_time
        )

    def work(cycles: int) -> Any:
        waiting = cycles * num_slots
        remaining = [new_tokens - done for done in running]
        starts = [0] * len(running) + entry_passes(remaining, [new_tokens] * waiting, num_slots, level)
        return courses(plans, running, waiting, prompt_tokens, new_tokens).work(starts)

    seconds = engine.step_time.seconds((work(2 * CYCLES) - work(CYCLES)) / CYCLES)
    return {"seconds": seconds, "level": level, "slots": num_slots}


def courses(
    plans: Sequence[DepthPlan], running: Sequence[int], num_waiting: int, prompt_tokens: int, new_tokens: int
) -> Courses:
    """Rows that have made `running` passes, then those that wait; plans by turns."""
    done = np.array([*running, *[0] * num_waiting])
    chosen = [plans[place % len(plans)] for place in range(len(done))]
    return Courses(
        prompt_tokens=np.full(len(done), prompt_tokens),
        clocks=done - 1,
        num_passes=new_tokens - done,
        cutoffs=np.array([plan.cutoffs for plan in chosen]),
        runs_prompt=np.array([plan.runs_prompt for plan in chosen]),
    )


class ServerProcess:
    """The process, from the benchmark's side."""

    def __init__(self, checkpoint: Path, dtype: str, *, slots: int, threads: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(checkpoint), dtype, str(slots), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.port = int(self._answer()["port"])

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        """Drain it, as at the end of its input."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def ask(self, **request: Any) -> dict[str, Any]:
        """See `reply`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server ended with exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


if __name__ == "__main__":
    main()
