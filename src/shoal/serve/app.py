"""The HTTP application: routes, and the way of a request.

Limits (limits.py) ─▶ schema.py ─▶ Intake (intake.py) ─▶ Worker (worker.py) ─▶ Reply (replies.py)
who, how long          fields       engine requests       the model's thread     OpenAI's form (streams.py, as it comes)
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from importlib.resources import files
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException

from shoal import __version__
from shoal.engine.engine import Engine
from shoal.engine.request import Generation
from shoal.serve import schema
from shoal.serve.config import ServeConfig
from shoal.serve.errors import ApiError, on_api_error, on_http_error, on_validation_error
from shoal.serve.forecast import forecast
from shoal.serve.intake import Intake, Job
from shoal.serve.limits import Limits
from shoal.serve.metrics import Metrics
from shoal.serve.replies import Reply
from shoal.serve.reranking import ServedModel, rank_config, rerank
from shoal.serve.scoring import scores, scoring_job
from shoal.serve.streams import Events, events, unless_gone
from shoal.serve.worker import Worker

log = logging.getLogger("shoal.serve")

T = TypeVar("T")
PAGE_HEADERS = {"content-security-policy": "default-src 'self'", "x-content-type-options": "nosniff"}
PAGE_TYPES = {
    "index.html": "text/html",
    "page.css": "text/css",
    "page.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}


class Server:
    """What the routes share, while the application runs."""

    def __init__(self, engine: Engine, config: ServeConfig) -> None:
        self.engine, self.config = engine, config
        self.metrics = Metrics(engine, lambda: len(self.worker.followers))
        self.worker = Worker(engine, self.metrics, max_queue=config.max_queue)
        self.intake = Intake(engine, config)
        self.started = int(time.time())
        self._preparing = ThreadPoolExecutor(1, thread_name_prefix="shoal-intake")
        self._ranking = ThreadPoolExecutor(config.max_rankings, thread_name_prefix="shoal-ranking")
        self._num_rankings = 0

    async def prepare(self, check: Callable[[], T]) -> T:
        """What `check` makes of a body, away from the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._preparing, check)

    async def answer(self, request: Request, check: Callable[[], Job]) -> Response:
        """Run a body's requests, and answer as it asked."""
        job = await self.prepare(check)
        reply = Reply(
            job=job, tokenizer=self.engine.tokenizer, num_layers=self.engine.shape.num_layers, model=self.config.model
        )
        follower = self.worker.submit(job.requests, request.state.key)
        if job.body.stream:
            return Events(follower, events(follower, reply, partial(note, request, reply)))
        try:
            done = await unless_gone(request, follower.generations())
            note(request, reply, done)
            # Thousands of log-probabilities with their tokens take a second to write: others' streams go on meanwhile.
            return await asyncio.to_thread(lambda: JSONResponse(reply.whole(done)))
        finally:
            follower.close()

    async def rerank(self, request: Request, body: schema.Rerank) -> Response:
        """Rank a body's documents, in a thread of their own."""
        config = await self.prepare(lambda: rank_config(self.intake, body))
        if self._num_rankings == self.config.max_rankings:
            message = f"{self._num_rankings} rankings are running: come again later"
            raise ApiError(429, message, code="queue_full", retry_after_s=1)
        model = ServedModel(self.intake, self.worker, body, request.state.key)
        ranking = self._ranking.submit(rerank, model, config)
        self._num_rankings += 1
        try:
            ranked = await unless_gone(request, asyncio.wrap_future(ranking))
        finally:
            model.close()
            self._num_rankings -= 1
        shoal = ranked["usage"]["shoal"]
        log.info(
            "%s key=%r documents=%d calls=%d tokens=%d seconds=%.3f",
            request.url.path, request.state.key, len(body.documents), shoal["calls"], shoal["tokens"], shoal["seconds"],
        )  # fmt: skip
        return JSONResponse(ranked)

    async def close(self) -> None:
        """The application ends; its requests have been answered."""
        await self.worker.close()
        self._preparing.shutdown()
        await asyncio.to_thread(self._ranking.shutdown)  # a ranking's thread may be about to ask the event loop


def note(request: Request, reply: Reply, done: list[Generation]) -> None:
    """A line in the log: what it was and what it took, and nothing of what was said."""
    usage = reply.usage(done)
    shoal = usage["shoal"]
    log.info(
        "%s key=%r user=%r prompt_tokens=%d new_tokens=%d mean_layers=%.2f of %d finish=%s seconds=%.3f",
        request.url.path,
        request.state.key,
        reply.job.body.user,
        usage["prompt_tokens"],
        usage["completion_tokens"],
        shoal["mean_layers"],
        shoal["layers"],
        ",".join(one.finish_reason for one in done),
        shoal["seconds"],
    )


def make_app(engine: Engine, config: ServeConfig) -> FastAPI:
    """The application over one engine. The model's thread lives while the application does (ASGI's lifespan)."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.server = Server(engine, config)
        yield
        await app.state.server.close()

    app = FastAPI(
        title="Shoal",
        version=__version__,
        description="OpenAI's completions with a depth per request.",
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        responses={400: {"model": schema.Error, "description": "A field is wrong, and named"}},
        exception_handlers={
            ApiError: on_api_error,
            RequestValidationError: on_validation_error,
            HTTPException: on_http_error,
        },
    )
    app.add_middleware(Limits, config=config)
    app.openapi = partial(specification, app, config.model)  # type: ignore[method-assign]

    def server() -> Server:
        running: Server = app.state.server
        return running

    @app.post("/v1/completions")
    async def completions(body: schema.Completion, request: Request) -> Response:
        """Complete prompts."""
        return await server().answer(request, lambda: server().intake.completion(body))

    @app.post("/v1/chat/completions")
    async def chat_completions(body: schema.Chat, request: Request) -> Response:
        """Answer in a conversation."""
        return await server().answer(request, lambda: server().intake.chat(body))

    @app.post("/v1/plan")
    async def plan(body: schema.Completion) -> dict[str, Any]:
        """What a request to `/v1/completions` would cost if it emits all that it may; nothing runs. One prompt, one completion."""
        job = await server().prepare(lambda: server().intake.completion(body))
        return forecast(engine, job.requests)

    @app.post("/v1/chat/plan")
    async def chat_plan(body: schema.Chat) -> dict[str, Any]:
        """What a request to `/v1/chat/completions` would cost; nothing runs."""
        job = await server().prepare(lambda: server().intake.chat(body))
        return forecast(engine, job.requests)

    @app.post("/v1/score")
    async def score(body: schema.Score, request: Request) -> Response:
        """How probable the model finds each continuation of a prompt."""
        job = await server().prepare(lambda: scoring_job(server().intake, body))
        follower = server().worker.submit(job.requests, request.state.key)
        try:
            done = await unless_gone(request, follower.generations())
        finally:
            follower.close()
        return JSONResponse(scores(job, done, model=config.model, num_layers=engine.shape.num_layers))

    @app.post("/v1/rerank")
    async def rank_again(body: schema.Rerank, request: Request) -> Response:
        """Put documents in order by asking the model about them, under a budget of calls."""
        return await server().rerank(request, body)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model, and what it lets a request ask for."""
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """The model by its name."""
        server().intake.check_model(name)
        return card()

    def card() -> dict[str, Any]:
        return {
            "id": config.model,
            "object": "model",
            "created": server().started,
            "owned_by": "shoal",
            "shoal": {
                "num_layers": engine.shape.num_layers,
                "max_positions": engine.config.max_positions,
                "max_tokens": config.max_tokens,
                "min_depth": config.min_depth,
                "tuned_depths": list(engine.tuned.depths) if engine.tuned else None,
                "drafts": list(config.drafts),
                "chat": bool(engine.tokenizer.chat_template),
            },
        }

    @app.post("/tokenize")
    async def tokenize(body: schema.Tokenize) -> dict[str, Any]:
        """Token ids of a text or a conversation."""
        tokens = await server().prepare(lambda: server().intake.tokens_of(body))
        return {"tokens": tokens, "count": len(tokens), "max_model_len": engine.config.max_positions}

    @app.post("/detokenize")
    async def detokenize(body: schema.Detokenize) -> dict[str, Any]:
        """The text of token ids, special tokens included."""
        return {"prompt": await server().prepare(lambda: server().intake.text_of(body))}

    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether the model's thread runs."""
        alive = server().worker.is_alive
        return JSONResponse(
            {"status": "ok" if alive else "the model's thread has ended"}, status_code=200 if alive else 503
        )

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """Whether there is room for another request."""
        room = server().worker.is_alive and server().worker.room > 0
        return JSONResponse({"status": "ready" if room else "full"}, status_code=200 if room else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(
            generate_latest(server().metrics.registry), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return page_file("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def page_file_named(name: str) -> Response:
        return page_file(name)

    return app


def specification(app: FastAPI, model: str) -> dict[str, Any]:
    """OpenAPI's description, with the one name that `model` may have. FastAPI says that it answers 422 where the body is wrong;
    here that is 400."""
    if app.openapi_schema is None:
        app.openapi_schema = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        for path in app.openapi_schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for body in app.openapi_schema["components"]["schemas"].values():
            if (name := body["properties"].get("model")) is not None:
                name["enum"] = [model] if name.get("type") == "string" else [model, None]
    return app.openapi_schema


def page_file(name: str) -> Response:
    """A file of the page."""
    if name not in PAGE_TYPES:
        raise ApiError(404, f"no file {name!r} here")
    content = (files("shoal.serve") / "page" / name).read_bytes()
    return Response(content, media_type=PAGE_TYPES[name], headers=PAGE_HEADERS)
