"""What the example servers answer: pictures, events and refusals in the words of OpenAI's
interface."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping
from typing import Any

from engine import Event, png
from orders import Order, read_order
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from toma_fx.errors import TomaError
from toma_fx.models import tiny

PATH = "/v1/images/generations"
METHODS: dict[str, dict[str, Any]] = {
    "merged": {"toma": True},
    "cached": {"toma": False, "cache": "balanced"},
    "both": {"toma": True, "cache": "balanced"},
    "neither": {"toma": False},
}
"""Options of `toma_fx.optimize` by name."""


class Refused(Exception):
    """A request that gets no picture: a status of HTTP, a reason and the field concerned."""

    def __init__(self, status: int, reason: str, field: str | None = None) -> None:
        super().__init__(reason)
        self.status, self.reason, self.field = status, reason, field

    def body(self) -> dict[str, Any]:
        """As OpenAI's interface words errors."""
        kind = "invalid_request_error" if self.status == 400 else "server_error"
        error = {"message": self.reason, "type": kind, "param": self.field, "code": self.status}
        return {"error": error}

    def response(self) -> Response:
        """The answer of a request that does not stream."""
        headers = {"Retry-After": "1"} if self.status in (429, 503) else None
        return JSONResponse(self.body(), self.status, headers)


async def read_request(request: Request, model: str) -> Order:
    """What a request of HTTP asks for.

    Raises:
        Refused: 400, with the reason.
    """
    try:
        return read_order(await request.json(), model, tiny.CLASSES, tiny.SIZE)
    except TomaError as error:
        raise Refused(400, str(error), error.where) from error
    except ValueError as error:
        raise Refused(400, f"the body is not JSON: {error}") from error


def message_of(event: Event, index: int) -> dict[str, Any]:
    """What a client hears of a picture that did not fail, the `index`-th of its request."""
    assert event.image is not None
    kind = "completed" if event.kind == "done" else "partial_image"
    data = base64.b64encode(png(event.image)).decode()
    text = f"image_generation.{kind}"
    return {"type": text, "index": index, "step": event.step, "b64_json": data}


def body_of(pictures: Mapping[int, str]) -> dict[str, Any]:
    """The body of an answer in one piece, of pictures in base64 by index."""
    data = [{"b64_json": pictures[i]} for i in sorted(pictures)]
    return {"created": int(time.time()), "data": data}


def event_text(kind: str, data: Mapping[str, Any]) -> str:
    """A server-sent event."""
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n"
