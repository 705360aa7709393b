"""Following a file of traces while it grows: an estimate per slice for every window of responses, and numbers for Prometheus.

A window is the next so many responses of one slice. Example, windows of 200: the 200th response of the slice "german" ends its
first window, the 400th its second; what is left over waits. Lines that are no traces are counted and said, and the rest goes
on; the last line waits until it is whole, or for the last look. The file is all there is to keep: whoever starts again reads it
from its beginning.
"""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shoal.errors import InvalidInput, MissingExtra
from shoal.signals.sentinel import Sentinel
from shoal.signals.slices import Affine, SliceEstimate, estimate_slices
from shoal.signals.traces import Traced, parse_traces


@dataclass(frozen=True, kw_only=True)
class Window:
    """A window of one slice that is full."""

    number: int
    """From 0 within the slice."""
    estimate: SliceEstimate
    """What the sentinel says of it."""


class Watch:
    """The windows of a file so far."""

    def __init__(
        self,
        sentinel: Sentinel,
        path: Path,
        *,
        window: int,
        top_k: int | None = None,
        affine: Affine | None = None,
        warn: Callable[[str], None] = lambda message: None,
    ) -> None:
        """`window`: responses in one; `top_k`: what a server was asked for; `affine`: a recalibration; `warn`: hears of lines that
        are no traces."""
        if window < 1:
            raise InvalidInput(f"a window has 1 response or more, got {window}")
        self.sentinel, self.path, self.window, self.top_k = sentinel, path, window, top_k
        self.affine, self.warn = affine or Affine(), warn
        self.windows: list[Window] = []
        self.num_responses: dict[str, int] = {}
        """By slice."""
        self.num_refused = 0
        self._offset = self._line = 0
        self._waiting: dict[str, list[Traced]] = {}
        self._num_windows: Counter[str] = Counter()

    def poll(self, *, final: bool = False) -> list[Window]:
        """Read what has come since the last call; returns the windows that it filled. Raises `InvalidInput` without a file.

        `final`: nothing more will come, so that a last line without an end counts.
        """
        try:
            size = self.path.stat().st_size
            if size < self._offset:  # the file was started anew
                self._offset = self._line = 0
                self._waiting.clear()
            with open(self.path, "rb") as file:
                file.seek(self._offset)
                read = file.read()
        except OSError as error:
            raise InvalidInput(f"{self.path} cannot be read: {error.strerror}") from error
        whole = read if final else read[: read.rfind(b"\n") + 1]
        start, self._offset = self._offset, self._offset + len(whole)
        filled: list[Window] = []
        if start == 0:
            whole = whole.removeprefix(codecs.BOM_UTF8)
        for line in whole.removesuffix(b"\n").split(b"\n") if whole else ():
            self._line += 1
            filled += self._take(line)
        self.windows += filled
        return filled

    def latest(self) -> list[SliceEstimate]:
        """The last window of each slice."""
        by_slice = {window.estimate.name: window.estimate for window in self.windows}
        return list(by_slice.values())

    def _take(self, line: bytes) -> list[Window]:
        """Add the responses of a line; the windows that they fill."""
        try:
            traced = list(parse_traces(line.decode("utf-8"), f"{self.path}, line {self._line}", top_k=self.top_k))
            for one in traced:
                self.sentinel.read([one.trace])  # refuses another k
        except (InvalidInput, UnicodeDecodeError) as error:
            self.num_refused += 1
            self.warn(str(error).replace(", line 1:", ":"))  # the parser counts the lines of what it is given
            return []
        filled = []
        for one in traced:
            waiting = self._waiting.setdefault(one.slice, [])
            waiting.append(one)
            self.num_responses[one.slice] = self.num_responses.get(one.slice, 0) + 1
            if len(waiting) == self.window:
                (estimate,) = estimate_slices(self.sentinel, waiting)
                filled.append(Window(number=self._num_windows[one.slice], estimate=self.affine.apply(estimate)))
                self._num_windows[one.slice] += 1
                waiting.clear()
        return filled


class WatchMetrics:
    """The last window of each slice as gauges for Prometheus."""

    GAUGES = ("estimate", "low", "high", "outside", "drift", "length_only", "atc", "mean_entropy")

    def __init__(self, watch: Watch) -> None:
        """Raises `MissingExtra` without prometheus-client."""
        try:
            from prometheus_client import CollectorRegistry, Gauge
        except ImportError as error:
            raise MissingExtra(
                "exporting to Prometheus needs prometheus-client: pip install 'shoal[monitor]'"
            ) from error
        self.watch, self.registry = watch, CollectorRegistry()
        texts = {
            "estimate": "Estimated accuracy of a slice's last window.",
            "low": "Lower end of its 95% interval.",
            "high": "Upper end of its 95% interval.",
            "outside": "Share of responses unlike those in training.",
            "drift": "Standard deviations outside the training slices.",
            "length_only": "What length alone would estimate.",
            "atc": "What ATC would estimate.",
            "mean_entropy": "Mean entropy per token, nats.",
        }
        self.gauges = {
            name: Gauge(f"shoal_monitor_{name}", texts[name], ["slice"], registry=self.registry) for name in self.GAUGES
        }
        self.alarm = Gauge("shoal_monitor_alarm", "1 where a slice has drifted.", ["slice"], registry=self.registry)
        self.responses = Gauge("shoal_monitor_responses", "Responses read.", ["slice"], registry=self.registry)
        Gauge("shoal_monitor_lines_refused", "Lines that are no traces.", registry=self.registry).set_function(
            lambda: watch.num_refused
        )

    def serve(self, port: int) -> None:
        """Answer at this machine's own address, in a thread. Raises `InvalidInput` where the port is taken."""
        from prometheus_client import start_http_server

        try:
            start_http_server(port, addr="127.0.0.1", registry=self.registry)
        except (OSError, OverflowError) as error:
            raise InvalidInput(f"port {port} cannot be listened on: {error}") from error

    def update(self) -> None:
        """Take the latest windows."""
        for one in self.watch.latest():
            for name, gauge in self.gauges.items():
                gauge.labels(one.name).set(getattr(one, name))
            self.alarm.labels(one.name).set(one.alarm)
        for name, count in self.watch.num_responses.items():
            self.responses.labels(name).set(count)
