"""The board: a page at `/` with the jobs, which calls the HTTP gateway. Its files are served as they are."""

from __future__ import annotations

import hashlib
import html
from collections.abc import Callable, Mapping
from functools import partial
from http import HTTPStatus
from importlib import resources

from jobstatus_grpc.web.http import Request, Route

_PAGE = "index.html"

_TYPES = {
    _PAGE: "text/html; charset=utf-8",
    "board.css": "text/css; charset=utf-8",
    "board.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}


def routes(grpc_address: Callable[[], str]) -> dict[str, Mapping[str, Route]]:
    """Return the routes of the board, which names the address that `grpc_address` returns as the one for gRPC."""
    files = {name: resources.files(__name__).joinpath(name).read_bytes() for name in _TYPES}

    async def send(name: str, request: Request) -> None:
        content = files[name].replace(b"GRPC_ADDRESS", html.escape(grpc_address()).encode())
        tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        # Browsers keep it and ask each time: another version of the server has another board.
        fields = [("etag", tag), ("cache-control", "no-cache")]
        if request.header("if-none-match") == tag:
            await request.respond(HTTPStatus.NOT_MODIFIED, fields=fields)
        else:
            await request.respond(HTTPStatus.OK, _TYPES[name], content, fields)

    return {"/" if name == _PAGE else f"/board/{name}": {"GET": partial(send, name)} for name in files}
