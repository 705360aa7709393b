"""A server of the page whose streams are written here: what a real one says once in a blue moon."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import shoal.serve

ALL_LAYERS = 12
MARKUP = "<img src=x onerror='window.hacked = 1'>"
ABOUT = {
    "num_layers": ALL_LAYERS, "max_positions": 512, "max_tokens": 512, "min_depth": 0.0834, "tuned_depths": None,
    "drafts": ["auto"], "chat": True,
}  # fmt: skip
FORECAST = {"layers": [12, 4], "mean_layers": 8.0, "num_layers": 12, "max_tokens": 2, "flops": 105, "dense_flops": 100}
USAGE = {
    "prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7,
    "shoal": {
        "layers": 12, "mean_layers": 8.0, "layer_tokens": 25, "layer_tokens_saved": 75, "flops": 1050000, "flops_saved": -50000,
        "draft": {"drafted": 4, "accepted": 3, "steps": 2}, "seconds": 0.5,
    },
}  # fmt: skip


def chat_event(text: str, *layers: int, finish_reason: str | None = None) -> dict[str, Any]:
    """A part of a chat's stream, with the layers of its tokens."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}
    return {"choices": [choice], "shoal": {"token_ids": list(range(len(layers))), "layers": layers}}


# By prompt. Without [DONE] at its end it breaks off.
STREAMS: dict[str, list[Any]] = {
    "markup": [
        chat_event(MARKUP, 12),
        chat_event("", 4),
        chat_event(" é\n", 4, 3, finish_reason="stop"),
        {"choices": [], "usage": USAGE},
        "[DONE]",
    ],
    "error": [chat_event("one", 12), {"error": {"message": "the cache is full"}}, "[DONE]"],
    "cut": [chat_event("one", 12), chat_event(" two", 4)],
}


class Scripted(BaseHTTPRequestHandler):
    """The page, and `STREAMS`."""

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            return self.answer("application/json", json.dumps({"data": [{"id": MARKUP, "shoal": ABOUT}]}).encode())
        kinds = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
        file = Path(shoal.serve.__path__[0]) / "page" / (self.path.removeprefix("/page/").strip("/") or "index.html")
        self.answer(kinds[file.suffix], file.read_bytes())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/plan":
            return self.answer("application/json", json.dumps(FORECAST).encode())
        events = STREAMS[body["messages"][0]["content"]]
        lines = (event if event == "[DONE]" else json.dumps(event) for event in events)
        self.answer("text/event-stream", "".join(f"data: {line}\r\n\r\n" for line in lines).encode())

    def answer(self, kind: str, content: bytes) -> None:
        """Send all of it."""
        self.send_response(200)
        for name, value in (("Content-Type", kind), ("Content-Security-Policy", "default-src 'self'")):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""
