"""What every HTTP request has to keep to, before anything reads its body: who sends it, how long it is and takes to come."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Mapping
from hashlib import sha256

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal.errors import InvalidInput
from shoal.serve.config import ServeConfig
from shoal.serve.errors import ApiError

PUBLIC = ("/", "/health", "/ready")
"""Paths that want no key, and whatever is under `/page/`."""


class Limits:
    """Middleware: refuses bodies that are too long or too slow, and callers without a key. Puts the key's name into the scope."""

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self.app, self.config = app, config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or let it pass."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        try:
            scope["state"]["key"] = self._caller(scope["path"], headers.get("authorization", ""))
            length = headers.get("content-length", "0")
            if length.isdigit() and int(length) > self.config.max_body_bytes:
                raise self._too_long()
            await self.app(scope, self._limited(receive), send)
        except ApiError as error:
            await error.response()(scope, receive, send)

    def _caller(self, path: str, authorization: str) -> str:
        """The name of whoever calls; raises `ApiError` for a key that nobody has."""
        if not self.config.api_keys or path in PUBLIC or path.startswith("/page/"):
            return ""
        name = holder(self.config.api_keys, authorization.removeprefix("Bearer ").strip())
        if name is None:
            raise ApiError(401, "this server wants a key: Authorization: Bearer KEY", code="invalid_api_key")
        return name

    def _limited(self, receive: Receive) -> Receive:
        """`receive` until the body is there; after that it waits for the client to go, which may take as long as it likes."""
        ends_at = asyncio.get_running_loop().time() + self.config.body_timeout_s
        num_bytes, whole = 0, False

        async def limited() -> Message:
            nonlocal num_bytes, whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout_at(ends_at):
                    message = await receive()
            except TimeoutError:
                seconds = self.config.body_timeout_s
                raise ApiError(408, f"the body did not arrive within {seconds:g} s", code="body_timeout") from None
            num_bytes += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if num_bytes > self.config.max_body_bytes:
                raise self._too_long()
            return message

        return limited

    def _too_long(self) -> ApiError:
        return ApiError(413, f"the body is longer than {self.config.max_body_bytes} bytes", code="body_too_long")


def holder(keys: Mapping[str, str], shown: str) -> str | None:
    """The name whose key is `shown`. Takes as long whichever key it is, or none."""
    found = None
    digest = sha256(shown.encode()).digest()
    for name, key in keys.items():
        if hmac.compare_digest(digest, sha256(key.encode()).digest()):
            found = name
    return found


def read_keys(text: str) -> dict[str, str]:
    """Keys by name from a file: a key per line, or a name and a key; `#` begins a comment.

    >>> read_keys("sk-one\\nalice sk-two  # until May")
    {'key 1': 'sk-one', 'alice': 'sk-two'}
    """
    keys: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        name = words[0] if len(words) > 1 else f"key {number}"
        if len(words) > 2 or name in keys or words[-1] in keys.values():
            raise InvalidInput(f"line {number}: one key per line, or a name and a key, each of them once")
        keys[name] = words[-1]
    if not keys:
        raise InvalidInput("no key in it: an empty file would let everybody in")
    return keys
