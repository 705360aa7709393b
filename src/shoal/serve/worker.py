"""The thread that owns the model, beside asyncio.

    event loop   submit ─▶ commands ─▶ │ worker: take commands, run a pass, take commands, ... │ ─▶ chunks ─▶ Follower

The event loop never waits for a pass, and nobody but the worker touches the engine's queue, slots and cache. Chunks of a pass come
back in one call.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue

from shoal.engine.engine import Engine
from shoal.engine.request import Chunk, Generation, Request
from shoal.models.memory import drop_freed
from shoal.serve.errors import ApiError
from shoal.serve.fair import FairShares
from shoal.serve.metrics import Metrics

log = logging.getLogger("shoal.serve")

RECENT = 64
"""Ended requests that the guess of when to come again looks at."""
LONGEST_RETRY_S = 60
TRIM_EVERY_S = 20
"""Requests of all sizes leave holes in the heap (the automaton of a long regular expression takes megabytes): so often what is free
in it goes back to the system, which takes some ten milliseconds."""
Command = Callable[[], None]


class Follower:
    """What one HTTP request hears of its requests. Whoever has one closes it."""

    def __init__(self, worker: Worker, requests: Sequence[Request]) -> None:
        """Made by `Worker.submit`."""
        self.worker, self.requests = worker, requests
        self.unfinished = {request.request_id for request in requests}
        self.chunks: asyncio.Queue[Chunk | ApiError] = asyncio.Queue()
        self.began = time.monotonic()

    async def next(self) -> Chunk | None:
        """What one request gained in a pass; None when all have ended. Raises `ApiError` where the model's thread failed."""
        if not self.unfinished:
            return None
        chunk = await self.chunks.get()
        if isinstance(chunk, ApiError):
            raise chunk
        if chunk.generation is not None:
            self.unfinished.discard(chunk.request_id)
        return chunk

    async def generations(self) -> list[Generation]:
        """All results, by prompt and sample."""
        done = []
        while (chunk := await self.next()) is not None:
            if chunk.generation is not None:
                done.append(chunk.generation)
        return sorted(done, key=lambda generation: (generation.index, generation.sample))

    def close(self) -> None:
        """Nobody listens any more: what is unfinished is cancelled, and its slots are free after the pass under way."""
        self.worker.forget(self)


class Worker:
    """Runs an engine for the coroutines of one event loop; call it from there."""

    def __init__(self, engine: Engine, metrics: Metrics, *, max_queue: int) -> None:
        """`max_queue`: most requests that wait for a slot."""
        self.engine, self.metrics = engine, metrics
        self.most = engine.runner.cache.num_slots + max_queue
        self.shares = FairShares()
        self.followers: dict[int, Follower] = {}
        """By request id, of all requests that have not ended."""
        self._ended: deque[float] = deque(maxlen=RECENT)
        self._last_chunk: dict[int, float] = {}
        self._commands: SimpleQueue[Command | None] = SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="shoal-model", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the model's thread runs."""
        return self._thread.is_alive()

    @property
    def room(self) -> int:
        """Requests that would be taken now."""
        return self.most - len(self.followers)

    def submit(self, requests: Sequence[Request], key: str, *, admitted: bool = False) -> Follower:
        """Queue requests for the holder of `key`. Raises `ApiError` where too many wait already, unless they go on with something
        that was `admitted` before."""
        if len(requests) > self.room and not admitted:
            self.metrics.refused.inc()
            raise ApiError(
                429,
                f"{len(self.followers)} requests are running or waiting: come again later",
                code="queue_full",
                retry_after_s=self._retry_after_s(),
            )
        for request in requests:
            request.priority = self.shares.tag(key, request)
        follower = Follower(self, requests)
        self.followers.update(dict.fromkeys(follower.unfinished, follower))
        self._commands.put(partial(self.engine.submit, requests))
        return follower

    def forget(self, follower: Follower) -> None:
        """See `Follower.close`."""
        left = [request_id for request_id in follower.unfinished if self.followers.get(request_id) is follower]
        follower.unfinished.clear()
        if left:
            self._commands.put(partial(self._cancel, left))

    async def close(self) -> None:
        """End the thread after the pass under way."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    def _retry_after_s(self) -> int:
        """Seconds until a place is free, as fast as requests have ended lately."""
        if len(self._ended) < 2:
            return 1
        per_s = (len(self._ended) - 1) / max(1e-3, time.monotonic() - self._ended[0])
        return min(LONGEST_RETRY_S, math.ceil(1 / per_s))

    # In the model's thread.

    def _cancel(self, request_ids: Sequence[int]) -> None:
        """They end before the next pass."""
        for request_id in request_ids:
            self.engine.cancel(request_id)

    def _run(self) -> None:
        """Passes while there is work, and sleep while there is none."""
        trimmed = time.monotonic()
        while self._take_commands():
            if not self.engine.has_work:
                continue
            if (now := time.monotonic()) - trimmed > TRIM_EVERY_S:
                drop_freed()
                trimmed = now
            began = time.perf_counter()
            try:
                chunks = self.engine.step()
            except Exception:
                log.exception("a pass failed; the requests that were running or waiting end with an error")
                self._loop.call_soon_threadsafe(self._fail)
                continue
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._deliver, chunks, time.perf_counter() - began)

    def _take_commands(self) -> bool:
        """Do what was asked for since the last pass, waiting for something to do. False: it is over."""
        while not (self.engine.has_work and self._commands.empty()):
            command = self._commands.get()
            if command is None:
                return False
            command()
        return True

    # Back in the event loop.

    def _deliver(self, chunks: Sequence[Chunk], pass_s: float) -> None:
        """Hand out what a pass brought."""
        self.metrics.pass_seconds.observe(pass_s)
        now = time.monotonic()
        for chunk in chunks:
            request_id, done = chunk.request_id, chunk.generation
            follower = self.followers.get(request_id)
            if follower is None:  # it failed, and has been told
                continue
            follower.chunks.put_nowait(chunk)
            before = self._last_chunk.get(request_id)
            if chunk.token_ids:
                if before is None:
                    self.metrics.first_token_seconds.observe(now - follower.began)
                    self.shares.served(next(r for r in follower.requests if r.request_id == request_id))
                else:
                    self.metrics.token_seconds.observe((now - before) / len(chunk.token_ids))
                self._last_chunk[request_id] = now
            if done is not None:
                del self.followers[request_id]
                self._last_chunk.pop(request_id, None)
                self._ended.append(now)
                self.metrics.ended(done, now - follower.began)

    def _fail(self) -> None:
        """The engine raised in a pass: nobody knows whose fault it was, so all who are in it end."""
        error = ApiError(500, "the model failed while it ran this request; the server's log says how")
        failed, self.followers = self.followers, {}
        self._last_chunk.clear()
        for follower in set(failed.values()):
            follower.chunks.put_nowait(error)
        self._commands.put(partial(self._cancel, list(failed)))
