"""Mixed load on a real `shoal serve`: clients that ask, vanish, send garbage, hang in the middle of a body, ask for too much.

    python tests/soak.py --minutes 20 --output studies/results/serve_soak.json

Honest requests (soak_requests.py) come from a pool; each is first asked alone of the idle server, and every later answer has to
be the same. At the end nothing may be left in the server, its resident memory has to have stopped growing, and SIGTERM has to wait
for what it has accepted. Prints what was found, with one JSON line last; exit code 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from shoal.files import write_json
from soak_requests import MISCHIEF, Ask, Busy, long_requests, pool

BATCH, QUEUE = 8, 24
OPTIONS = (
    "--dtype", "float32", "--max-batch", str(BATCH), "--max-queue", str(QUEUE), "--max-pass-tokens", "64", "--cache-gib", "0.25",
    "--body-timeout-s", "2", "--max-body-mib", "0.25", "--max-tokens", "200", "--timeout-s", "600", "--threads", "1",
)  # fmt: skip
HONEST = 0.6
"""Share of the requests that are no mischief."""
EVERY_S = 1.0
"""Seconds between looks at the server's memory."""
WARM_UP = 0.2
"""Share of the time whose memory is not looked at: allocators fill their pools, every kind of request comes for the first time."""


class Load:
    """Clients in threads, until told to stop; what they saw."""

    def __init__(self, ask: Ask, expected: list[Any], requests: list[Any], seed: int) -> None:
        self.ask, self.expected, self.requests, self.seed = ask, expected, requests, seed
        self.over = threading.Event()
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []

    def run(self, num_clients: int) -> list[threading.Thread]:
        """Start the clients."""
        threads = [threading.Thread(target=self._client, args=(number,)) for number in range(num_clients)]
        for thread in threads:
            thread.start()
        return threads

    def _client(self, number: int) -> None:
        rng = random.Random(f"{self.seed}-{number}")
        while not self.over.is_set():
            try:
                if rng.random() < HONEST:
                    self._honest(rng)
                else:
                    mischief = rng.choice(MISCHIEF)
                    self.seen[f"{mischief.__name__}: {mischief(self.ask.address, self.ask.model, rng)}"] += 1
            except Exception as error:
                self.wrong.append(f"client {number}: {error!r}")

    def _honest(self, rng: random.Random) -> None:
        which = rng.randrange(len(self.requests))
        try:
            answer = self.ask(self.requests[which])
        except Busy:  # the queue was full: a client that is told so comes again
            self.seen["honest: 429"] += 1
            time.sleep(0.2)
            return
        self.seen["honest: answered"] += 1
        if answer != self.expected[which]:
            self.wrong.append(f"{self.requests[which]} gave {answer}, alone {self.expected[which]}")


@contextmanager
def serving(model: str, folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`shoal serve` as a process of its own; its host and port."""
    said = folder / "stderr"
    command = (sys.executable, "-m", "shoal.cli.main", "serve", model, "--port", "0", *OPTIONS)
    with said.open("w") as stderr, subprocess.Popen(command, stderr=stderr) as server:
        try:
            while not (found := re.search(r"http://([^ /]+)/", said.read_text())):
                assert server.poll() is None, said.read_text()
                time.sleep(0.05)
            yield server, found[1]
        finally:
            if server.poll() is None:
                server.kill()


def resident_kib(pid: int) -> int:
    """Resident memory of a process."""
    (line,) = re.findall(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), flags=re.MULTILINE)
    return int(line)


def slope(minutes: np.ndarray, kib: np.ndarray, num_windows: int = 20) -> dict[str, float]:
    """Growth of resident memory after warm-up, KiB per minute with its 95% interval: least squares over medians of windows, whose
    errors depend on one another less than those of seconds."""
    windows = [half for half in np.array_split(np.arange(len(kib)), num_windows) if len(half)]
    x, y = (np.array([np.median(values[window]) for window in windows]) for values in (minutes, kib))
    fit = stats.linregress(x, y)
    half = float(stats.t.ppf(0.975, len(x) - 2) * fit.stderr)
    return {"per_minute": float(fit.slope), "low": float(fit.slope) - half, "high": float(fit.slope) + half}


def until(holds: Any, timeout_s: float = 90) -> None:
    """Wait for it."""
    ends_at = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < ends_at, "it did not come in time"
        time.sleep(0.02)


def end_under_load(
    ask: Ask, server: subprocess.Popen[bytes], expected: list[Any], requests: list[Any]
) -> dict[str, Any]:
    """SIGTERM while more requests are accepted than run: every one of them is answered in full."""
    answers: list[Any] = [None] * len(requests)

    def take(place: int) -> None:
        answers[place] = ask(requests[place])

    threads = [threading.Thread(target=take, args=(place,)) for place in range(len(requests))]
    for thread in threads:
        thread.start()
    while (held := ask.metrics())["requests_unfinished"] < len(requests):
        time.sleep(0.01)
    server.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(600)
    lost = sum(one != other for one, other in zip(answers, expected, strict=True))
    return {
        "accepted": len(requests),
        "waiting_at_sigterm": held["requests_waiting"],
        "lost": lost,
        "exit_code": server.wait(60),
    }


def soak(model: str, folder: Path, *, minutes: float, num_clients: int, seed: int, size: int) -> dict[str, Any]:
    """All of it; the result's `wrong` is empty where all is well."""
    requests, lasting = pool(model, size, seed), long_requests(model, BATCH + 8)
    with serving(model, folder) as (server, address):
        ask = Ask(address, model)
        expected, expected_last = [ask(body) for body in requests], [ask(body) for body in lasting]
        before = {"files": len(list(Path(f"/proc/{server.pid}/fd").iterdir())), "threads": ask.threads(server.pid)}
        load = Load(ask, expected, requests, seed)
        began, looks = time.monotonic(), []
        threads = load.run(num_clients)
        while time.monotonic() - began < 60 * minutes and server.poll() is None:
            time.sleep(EVERY_S)
            looks.append(((time.monotonic() - began) / 60, resident_kib(server.pid), sum(load.seen.values())))
        load.over.set()
        for thread in threads:
            thread.join(600)
        until(lambda: not any(ask.metrics().values()))
        until(lambda: len(list(Path(f"/proc/{server.pid}/fd").iterdir())) <= before["files"])
        after = {"files": len(list(Path(f"/proc/{server.pid}/fd").iterdir())), "threads": ask.threads(server.pid)}
        again = [ask(body) for body in requests]
        ending = end_under_load(ask, server, expected_last, lasting)
    at, kib, done = (np.array(column, dtype=float) for column in zip(*looks, strict=True))
    kept = at > WARM_UP * minutes
    growth = slope(at[kept], kib[kept])
    per_thousand = 1000 / ((done[-1] - done[kept][0]) / (at[-1] - at[kept][0]))
    wrong = load.wrong + [
        f"alone again: {body}" for body, x, y in zip(requests, expected, again, strict=True) if x != y
    ]
    if ending["lost"] or after["files"] > before["files"]:
        wrong.append(f"left behind or lost: {before} before, {after} after, {ending}")
    return {
        "minutes": minutes, "clients": num_clients, "seed": seed, "model": Path(model).name, "options": " ".join(OPTIONS),
        "requests": sum(load.seen.values()), "seen": dict(sorted(load.seen.items())),
        "equal_to_alone": load.seen["honest: answered"] - sum(one.startswith("(") for one in load.wrong),
        "before": before, "after": after, "sigterm": ending,
        "resident_kib": {
            "first": int(kib[0]), "after_warm_up": int(np.median(kib[kept][:30])), "last": int(np.median(kib[-30:])),
            "most": int(kib.max()), "kib_per_minute": growth, "kib_per_1000_requests": growth["per_minute"] * per_thousand,
        },
        "wrong": wrong[:20],
    }  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="shoal-e2e")
    options.add_argument("--minutes", type=float, default=20)
    options.add_argument("--clients", type=int, default=12)
    options.add_argument("--size", type=int, default=80, help="different honest requests")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--output", type=Path)
    given = options.parse_args()
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        result = soak(
            given.model,
            Path(folder),
            minutes=given.minutes,
            num_clients=given.clients,
            seed=given.seed,
            size=given.size,
        )
    print(json.dumps(result, indent=1))
    if given.output:
        write_json(given.output, result)
    print(json.dumps(result))
    sys.exit(bool(result["wrong"]))


if __name__ == "__main__":
    main()
