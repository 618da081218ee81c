"""Requests to the HTTP gateway of a server, and other projects' clients of it."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

SERVICE_PATH = "/jobstatus.v1.JobStatusService"

NODE_FOLDER = Path(__file__).parents[1] / "web" / "node"

DESCRIPTOR_SET = Path(__file__).parents[2] / "generated/jobstatus/v1/descriptor_set.binpb"

DEADLINE_SECONDS = 20.0


@dataclass(frozen=True)
class Reply:
    """A response."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def reason(self) -> str:
        """The reason of our error, of Connect or of a problem."""
        body = self.json()
        return str(body["reason"] if "reason" in body else body["details"][0]["debug"]["reason"])


class Web:
    """The HTTP gateway at a URL, over a new connection for each request."""

    def __init__(self, url: str, *, token: str = "", tls: ssl.SSLContext | None = None) -> None:
        self.url = url
        parts = urlsplit(url)
        self.host, self.port = str(parts.hostname), int(parts.port or 0)
        self._headers = {"authorization": f"Bearer {token}"} if token else {}
        self._tls = tls

    def connect(self) -> http.client.HTTPConnection:
        if self._tls is not None:
            return http.client.HTTPSConnection(self.host, self.port, timeout=DEADLINE_SECONDS, context=self._tls)
        return http.client.HTTPConnection(self.host, self.port, timeout=DEADLINE_SECONDS)

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """Send a request; a body that is no bytes is sent as JSON. `_` in the name of a header is `-`."""
        fields = {**self._headers, **{name.replace("_", "-"): value for name, value in headers.items()}}
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            fields.setdefault("content-type", "application/json")
        connection = self.connect()
        try:
            connection.request(method, path, body, fields)
            response = connection.getresponse()
            return Reply(response.status, response.headers, response.read())
        finally:
            connection.close()

    def call(self, rpc: str, message: Any, **headers: str) -> Reply:
        """Call a unary RPC in Connect's JSON."""
        return self.request("POST", f"{SERVICE_PATH}/{rpc}", message, **headers)

    def stream(self, rpc: str, message: Any, **headers: str) -> Iterator[Any]:
        """Call a stream in Connect's JSON; yields messages, then the end: `{}` or `{"error": …}`."""
        data = json.dumps(message).encode()
        fields = {**self._headers, **{name.replace("_", "-"): value for name, value in headers.items()}}
        fields["content-type"] = "application/connect+json"
        connection = self.connect()
        try:
            frame = b"\0" + len(data).to_bytes(4, "big") + data
            connection.request("POST", f"{SERVICE_PATH}/{rpc}", frame, fields)
            response = connection.getresponse()
            assert response.status == 200, response.read()
            while head := response.read(5):
                yield json.loads(response.read(int.from_bytes(head[1:], "big")))
        finally:
            connection.close()

    def raw(self, data: bytes = b"", *, receive_buffer_bytes: int | None = None) -> socket.socket:
        """Open a connection and send bytes."""
        connection = socket.socket()
        if receive_buffer_bytes is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        connection.settimeout(DEADLINE_SECONDS)
        connection.connect((self.host, self.port))
        connection.sendall(data)
        return connection


def read_all(connection: socket.socket) -> bytes:
    """Read until the server closes the connection."""
    data = b""
    with connection:
        try:
            while part := connection.recv(65536):
                data += part
        except ConnectionResetError:
            pass
    return data


def run_node(folder: Path, script: str, *arguments: str) -> str:
    """Run a script of tests/web/node with Node.js, in a folder with its packages; return what it prints."""
    done = subprocess.run(
        ["node", folder / script, *arguments], capture_output=True, text=True, timeout=60, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
