"""Errors as OpenAI's API gives them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from shoal.errors import InvalidInput

TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}
"""By status; whatever is not here is the client's mistake."""

UNSUPPORTED = dict.fromkeys(
    ("tools", "tool_choice", "functions", "function_call"),
    "this server calls no tools; response_format gives answers a form that programs can read",
)
"""Why fields of OpenAI's API are not among ours, where more can be said than that."""


ALTERNATIVE = re.compile(r"(constrained-)?str|list\[.+\]|Document")
"""What pydantic puts into the path of a field that may have one of several types."""


class ApiError(HTTPException):
    """What a request is answered with instead. One of FastAPI's own errors: others that come up while it reads a body, it hides."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        """`param`: the field of the body that is at fault; `retry_after_s`: when to come again."""
        super().__init__(status, message)
        self.param, self.code, self.retry_after_s = param, code, retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        """JSON-ready form."""
        kind = TYPES.get(self.status_code, "invalid_request_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer over HTTP."""
        # What will not be better the second time is not to be tried again by clients that do so by themselves.
        headers = {"x-should-retry": "true" if self.status_code in (429, 503) else "false"}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(self.retry_after_s)
        if self.status_code == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse(self.body, status_code=self.status_code, headers=headers)


def invalid(error: InvalidInput, param: str | None = None) -> ApiError:
    """The engine's own refusal of a request."""
    return ApiError(400, str(error), param=param)


async def on_api_error(_: Request, error: Exception) -> JSONResponse:
    """Handler of `ApiError`."""
    assert isinstance(error, ApiError)
    return error.response()


async def on_validation_error(_: Request, error: Exception) -> JSONResponse:
    """Handler of bodies that do not fit the schema: the first thing wrong with it. The body itself is not repeated."""
    assert isinstance(error, RequestValidationError)
    problems = error.errors()
    # Of a field that may be this or that, rather what is wrong with that than that it is not this.
    same_field = [one for one in problems if one["loc"][:2] == problems[0]["loc"][:2]]
    problem = next((one for one in same_field if not one["type"].endswith("_type")), problems[0])
    location, message = problem["loc"], problem["msg"]
    if problem["type"] == "misplaced":
        location = (*location, problem["ctx"]["field"])
    param = path_of(location)
    if problem["type"] == "extra_forbidden":
        message = UNSUPPORTED.get(param or "", "is not a parameter that this server knows")
    return ApiError(400, f"{param or 'body'}: {message}", param=param).response()


async def on_http_error(_: Request, error: Exception) -> JSONResponse:
    """Handler of the framework's own refusals: unknown paths and methods, bodies that are not JSON."""
    assert isinstance(error, StarletteHTTPException)
    return ApiError(error.status_code, str(error.detail)).response()


def path_of(location: Sequence[str | int]) -> str | None:
    """A field as users write it.

    >>> path_of(("body", "messages", 0, "content"))
    'messages[0].content'
    >>> path_of(("body", "prompt", "list[list[constrained-int]]", 3))
    'prompt[3]'
    """
    path = ""
    for part in location[1:]:
        if isinstance(part, str) and ALTERNATIVE.fullmatch(part):
            continue
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.lstrip(".") or None
