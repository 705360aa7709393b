"""A client that loads a server over HTTP and takes little of the cores that it shares with it.

Raw asyncio streams and no JSON: a client's library would take a tenth of a core for what is a timestamp per token here. An event with
text is a token; servers that put several into one are refused by their number.
"""

from __future__ import annotations

import asyncio
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
    """Each token is here."""

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
        return (self.token_s[-1] - self.token_s[0]) / (len(self.token_s) - 1)


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where requests go, and how each is asked."""

    port: int
    body: Callable[[int], bytes]
    """JSON of the n-th request."""
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
                raise RuntimeError(f"{status.decode().strip()}: {(await reader.read()).decode(errors='replace')[-500:]}")
            token_s = []
            async for line in reader:
                if line.startswith(b"data: {") and b'"text":""' not in line:
                    token_s.append(time.perf_counter())
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
        if len(token_s) != self.new_tokens:
            raise RuntimeError(f"{self.new_tokens} tokens were asked for, {len(token_s)} events came")
        return Answer(sent_s=sent_s, token_s=token_s)


def arrivals(rate_per_s: float, count: int, seed: int) -> list[float]:
    """Seconds at which `count` requests of a Poisson process are sent: the gaps between them are exponential."""
    generator, at, times = random.Random(seed), 0.0, []
    for _ in range(count):
        at += generator.expovariate(rate_per_s)
        times.append(at)
    return times


async def open_loop(target: Target, times: Sequence[float], first: int = 0) -> list[Answer]:
    """Send requests `first`, `first + 1`, ... at `times`, however many are unanswered, and wait for all."""

    async def later(number: int, at: float) -> Answer:
        await asyncio.sleep(at)
        return await target.ask(number)

    return await asyncio.gather(*(later(first + place, at) for place, at in enumerate(times)))


async def closed_loop(
    target: Target, *, clients: int, spacing_s: float, warm_up: int, measured: int, first: int = 0
) -> tuple[list[Answer], float]:
    """Clients that each send their next request when they have the answer to their last, beginning one after the other.

    Returns the `measured` answers that come after the first `warm_up`, and the seconds from the last of these to the last of those:
    where answers come in waves, that is from a place in a wave to the same place in another. What is unanswered then is dropped.
    """
    numbers = iter(range(first, 10**9))
    answers: list[Answer] = []
    enough: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def client(place: int) -> None:
        await asyncio.sleep(place * spacing_s)
        while not enough.done():
            answers.append(await target.ask(next(numbers)))
            if len(answers) == warm_up + measured:
                enough.set_result(None)

    tasks = [asyncio.ensure_future(client(place)) for place in range(clients)]
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
