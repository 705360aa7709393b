"""Numbers for Prometheus, at `/metrics`."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from shoal.engine.engine import Engine
from shoal.engine.request import Generation

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """Counters of one server. What belongs to the engine is read when it is asked for."""

    def __init__(self, engine: Engine, num_unfinished: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests that ended, by how.", "finish_reason")
        self.refused = self._counter("requests_refused", "Requests that found the queue full.")
        self.tokens = self._counter("tokens", "Tokens, of prompts and new.", "kind")
        self.layer_tokens = self._counter("layer_tokens", "Layers times tokens, of those run and those saved.", "kind")
        self.flops = self._counter("flops", "Floating-point operations, of those run and those saved.", "kind")
        self.drafted = self._counter("drafted_tokens", "Drafted tokens, by what became of them.", "kind")
        self.pass_seconds = self._histogram("pass_seconds", "Seconds of a forward pass with its bookkeeping.")
        self.first_token_seconds = self._histogram("first_token_seconds", "Seconds to a request's first token.")
        self.token_seconds = self._histogram("token_seconds", "Seconds between a request's tokens.")
        self.request_seconds = self._histogram("request_seconds", "Seconds of whole requests.")
        runner = engine.runner
        gauges = {
            "requests_unfinished": ("Requests that have been taken and have not ended.", num_unfinished),
            "requests_running": ("Requests with a cache slot.", lambda: len(runner.slots.running)),
            # Not the scheduler's own count: those on their way to the model's thread wait, too.
            "requests_waiting": (
                "Requests without one.",
                lambda: max(0, num_unfinished() - len(runner.slots.running)),
            ),
            "cache_bytes": ("Bytes of cache blocks in use.", lambda: runner.cache.bytes_in_use),
        }
        for name, (text, read) in gauges.items():
            Gauge(f"shoal_{name}", text, registry=self.registry).set_function(read)

    def ended(self, done: Generation, seconds: float) -> None:
        """A request ended after `seconds`."""
        ledger = done.ledger
        run = ledger.prompt_flops + ledger.decode_flops + ledger.draft_flops
        dense = ledger.dense_prompt_flops + ledger.dense_decode_flops
        self.requests.labels(done.finish_reason).inc()
        self.tokens.labels("prompt").inc(ledger.prompt_tokens)
        self.tokens.labels("new").inc(ledger.new_tokens)
        self.layer_tokens.labels("run").inc(ledger.layer_tokens)
        self.layer_tokens.labels("saved").inc(ledger.layer_tokens_saved)
        self.flops.labels("run").inc(run)
        self.flops.labels("saved").inc(max(0, dense - run))
        if done.drafting is not None:
            self.drafted.labels("accepted").inc(done.drafting.accepted)
            self.drafted.labels("taken_back").inc(done.drafting.taken_back)
        self.request_seconds.observe(seconds)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"shoal_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"shoal_{name}", text, buckets=SECONDS, registry=self.registry)
