"""A client that loads a server over HTTP and takes little of the cores that it shares with it.

Raw asyncio streams and no JSON: a client's library would take a tenth of a core for what is a timestamp per token here. An event
with text is a token; a server that is behind may put several into one, so the number of tokens is the one that its `usage` says.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One streamed completion, in seconds of the client's clock."""

    sent_s: float
    """The connection is asked for."""
    token_s: Sequence[float]
    """Each event with text is here: a token, or several that come together."""
    num_tokens: int

    @property
    def first_s(self) -> float:
        """TTFT: from sending to the first token; waiting in line and reading the prompt are in it."""
        return self.token_s[0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        """Inter-token latencies: the gaps between tokens, what comes before the first one excluded."""
        return [after - before for before, after in zip(self.token_s, self.token_s[1:], strict=False)]

    @property
    def per_token_s(self) -> float:
        """TPOT: the mean gap."""
        return (self.token_s[-1] - self.token_s[0]) / (self.num_tokens - 1)


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where requests go, and how each is asked."""

    port: int
    body: Callable[[int], bytes]
    """JSON of the n-th request; it asks for a stream with usage."""
    new_tokens: int
    """Tokens that every answer has to have."""

    async def ask(self, number: int) -> Answer:
        """Send request `number` on a connection of its own, and read its stream. Raises `RuntimeError` for any other answer."""
        body = self.body(number)
        sent_s = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
                b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
            )
            status = await reader.readline()
            if b" 200 " not in status:
                raise RuntimeError(
                    f"{status.decode().strip()}: {(await reader.read()).decode(errors='replace')[-500:]}"
                )
            token_s, last = [], b""
            async for line in reader:
                if line.startswith(b"data: {"):
                    last = line
                    if b'"text":"' in line and b'"text":""' not in line:
                        token_s.append(time.perf_counter())
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
        if b'"completion_tokens":%d' % self.new_tokens not in last or len(token_s) < 2:
            raise RuntimeError(
                f"not {self.new_tokens} tokens in {len(token_s)} events; the last one: {last.decode()[-300:]}"
            )
        return Answer(sent_s=sent_s, token_s=token_s, num_tokens=self.new_tokens)


def arrivals(rate_per_s: float, count: int, seed: int) -> list[float]:
    """Seconds at which `count` requests of a Poisson process are sent: the gaps between them are exponential."""
    generator, at, times = random.Random(seed), 0.0, []
    for _ in range(count):
        at += generator.expovariate(rate_per_s)
        times.append(at)
    return times


async def open_loop(target: Target, times: Sequence[float]) -> list[Answer]:
    """Send a request at each of `times`, however many are unanswered, and wait for all."""

    async def later(number: int, at: float) -> Answer:
        await asyncio.sleep(at)
        return await target.ask(number)

    return await asyncio.gather(*(later(place, at) for place, at in enumerate(times)))


async def closed_loop(
    target: Target, *, begins_s: Sequence[float], warm_up: int, measured: int
) -> tuple[list[Answer], float]:
    """Clients, one for each of `begins_s`, that send their next request when they have the answer to their last.

    Returns the `measured` answers that come after the first `warm_up`, and the seconds from the last of these to the last of those:
    where answers come in waves, that is from a place in a wave to the same place in another. What is unanswered then is dropped.
    """
    numbers = itertools.count()
    answers: list[Answer] = []
    enough: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def client(begin_s: float) -> None:
        await asyncio.sleep(begin_s)
        while not enough.done():
            answers.append(await target.ask(next(numbers)))
            if len(answers) == warm_up + measured:
                enough.set_result(None)

    tasks = [asyncio.ensure_future(client(begin_s)) for begin_s in begins_s]
    try:
        await asyncio.wait([enough, *tasks], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    for one in ended:
        if isinstance(one, Exception):
            raise one
    counted = answers[warm_up : warm_up + measured]
    return counted, counted[-1].token_s[-1] - answers[warm_up - 1].token_s[-1]
