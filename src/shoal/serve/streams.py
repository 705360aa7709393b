"""Answers while they come: server-sent events, and clients that go away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from shoal.engine.request import Generation
from shoal.serve.errors import ApiError
from shoal.serve.replies import Reply
from shoal.serve.worker import Follower

T = TypeVar("T")
PING_S = 15
"""Seconds without an event after which a stream says that it is alive."""


class Events(StreamingResponse):
    """A stream of server-sent events; however it ends, its requests do, too."""

    def __init__(self, follower: Follower, content: AsyncIterator[str]) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self.follower = follower

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.follower.close()


async def events(follower: Follower, reply: Reply, on_end: Callable[[list[Generation]], None]) -> AsyncIterator[str]:
    """A stream's events, from the first to `[DONE]`. `on_end` hears of the results where all went well."""
    for event in reply.first_events():
        yield sse(event)
    done: list[Generation] = []
    try:
        while True:
            try:
                async with asyncio.timeout(PING_S):
                    chunk = await follower.next()
            except TimeoutError:
                yield ": the model is at it\n\n"
                continue
            if chunk is None:
                break
            if chunk.generation is not None:
                done.append(chunk.generation)
            if chunk.labels:
                yield sse(reply.labels_event(chunk, chunk.labels))
            if (news := reply.event(chunk)) is not None:
                yield sse(news)
    except ApiError as error:
        yield sse(error.body)
    else:
        on_end(done)
        if reply.job.body.stream_options.include_usage:
            yield sse(reply.last_event(done))
    yield "data: [DONE]\n\n"


def sse(event: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What comes of `work`, while somebody waits. Raises `ApiError` where the client has gone, for the log: nobody reads it."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ApiError(499, "the client has gone")
    finally:
        working.cancel()
        leaving.cancel()
