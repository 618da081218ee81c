"""Where events are delivered: a webhook (CloudEvents, signed after Standard Webhooks), Slack, or a command.

A target delivers an event once, or raises DeliveryError. Secrets, paths and queries of URLs are never logged.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import http.client
import json
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, Protocol, TypeVar
from urllib.parse import SplitResult, quote, urlsplit

from jobstatus_grpc.job import JobState
from jobstatus_grpc.relay.event import Event

T = TypeVar("T")

MAX_RETRY_AFTER_SECONDS = 3600.0
"""Limit of the pause that a receiver may ask for."""

SECRET_PREFIX = "whsec_"

MIN_SECRET_BYTES, MAX_SECRET_BYTES = 24, 64
"""Of a signing secret; the limits of the Standard Webhooks specification."""

MAX_SLACK_CHARACTERS = 500
"""Of a name, a reason or an error in a message for Slack."""

SECRET_VARIABLES = ("JOBSTATUS_WEBHOOK", "JOBSTATUS_WEBHOOK_SECRET", "JOBSTATUS_SLACK", "JOBSTATUS_STATE_FILE")
"""What a command does not get in its environment."""


class DeliveryError(Exception):
    """An event was not delivered, as far as is known; the text says why."""

    def __init__(self, text: str, *, retry_after_seconds: float = 0.0) -> None:
        # A receiver writes a part of it, and a terminal may show it.
        super().__init__("".join(character if character.isprintable() else " " for character in text.strip()))
        self.retry_after_seconds = retry_after_seconds
        """The pause that the receiver asked for; 0: none."""


class Target(Protocol):
    """A receiver of events."""

    @property
    def name(self) -> str:
        """What the log calls it, without anything secret."""
        ...

    async def deliver(self, event: Event) -> None:
        """Deliver an event.

        Raises:
            DeliveryError: it may not have been delivered.
        """
        ...


def parse_url(text: str) -> SplitResult:
    """Return the parts of a URL of a receiver.

    Raises:
        ValueError: it is no URL to deliver to.
    """
    url = urlsplit(text)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError("must begin with https:// or http:// and the name of a host")
    if url.username is not None or url.password is not None:
        raise ValueError("must not have a user or a password; sign the requests instead")
    if url.fragment or not text.isascii() or any(character <= " " or character == "\x7f" for character in text):
        raise ValueError("must not have a #, spaces or characters beyond ASCII")
    _ = url.port  # raises ValueError if it is none
    return url


def read_secrets(text: str) -> list[bytes]:
    """Return the signing secrets in a text, one a line: `whsec_` and base64, or base64 alone.

    Raises:
        ValueError: there is none, or one is not valid. The message has nothing of them.
    """
    secrets = []
    for number, line in enumerate(text.split(), start=1):
        try:
            secret = base64.b64decode(line.removeprefix(SECRET_PREFIX), validate=True)
        except ValueError:
            raise ValueError(f"secret {number} is not {SECRET_PREFIX} and base64") from None
        if not MIN_SECRET_BYTES <= len(secret) <= MAX_SECRET_BYTES:
            raise ValueError(f"secret {number} must have {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} bytes in base64")
        secrets.append(secret)
    if not secrets:
        raise ValueError("there is no secret")
    return secrets


class Webhook:
    """Sends CloudEvents over HTTP: binary mode, or structured; signed if there are secrets."""

    def __init__(
        self, url: str, *, secrets: Sequence[bytes] = (), is_structured: bool = False, timeout_seconds: float
    ) -> None:
        """With several secrets, each request has a signature by each, so that they can be changed one by one."""
        self._receiver = _Receiver(url, timeout_seconds)
        self._secrets = secrets
        self._is_structured = is_structured
        self.name = f"webhook {self._receiver.name}"

    async def deliver(self, event: Event) -> None:
        """Send the event; any answer but 2xx is an error."""
        if self._is_structured:
            headers = {"Content-Type": "application/cloudevents+json; charset=utf-8"}
            body = _to_json(event.envelope)
        else:
            # Encoded as the HTTP binding of CloudEvents has it.
            headers = {f"ce-{name}": quote(value, safe=_PLAIN) for name, value in event.attributes.items()}
            headers["Content-Type"] = "application/json"
            body = _to_json(event.data)
        now = int(time.time())
        headers |= {"webhook-id": event.id, "webhook-timestamp": str(now)}
        if self._secrets:
            headers["webhook-signature"] = " ".join(signature(secret, event.id, now, body) for secret in self._secrets)
        await self._receiver.post(headers, body)


_PLAIN = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) not in '"%')


def signature(secret: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    """Return the signature of a message, after the Standard Webhooks specification."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    return f"v1,{base64.b64encode(hmac.digest(secret, signed, hashlib.sha256)).decode()}"


class Slack:
    """Sends a line about a job to an incoming webhook of Slack."""

    def __init__(self, url: str, *, timeout_seconds: float) -> None:
        self._receiver = _Receiver(url, timeout_seconds)
        self.name = f"Slack at {self._receiver.name}"

    async def deliver(self, event: Event) -> None:
        """Send the line; any answer but 2xx is an error."""
        await self._receiver.post({"Content-Type": "application/json"}, _to_json({"text": slack_text(event)}))


_SYMBOLS = {
    JobState.SUCCEEDED: ":white_check_mark:",
    JobState.FAILED: ":x:",
    JobState.ABORTED: ":no_entry:",
    JobState.CANCELLED: ":no_entry_sign:",
}


def slack_text(event: Event) -> str:
    """Return one line about the job in Slack's mrkdwn; texts of the job cannot format it or mention anybody."""
    job = event.job
    why = job.error.message if job.error is not None and job.error.message else job.reason
    name = f"*{_escaped(job.name)}* " if job.name else ""
    line = f"{_SYMBOLS.get(job.state, ':information_source:')} {name}`{job.id}` {job.state.word.replace('_', ' ')}"
    if job.attempt > 1:
        line += f" (attempt {job.attempt})"
    return f"{line}: {_escaped(why)}" if why else line


def _escaped(text: str) -> str:
    text = " ".join(text.split())
    if len(text) > MAX_SLACK_CHARACTERS:
        text = text[: MAX_SLACK_CHARACTERS - 1] + "…"
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # A zero-width space keeps what would format the text from doing so.
    return "".join(f"\u200b{character}\u200b" if character in "*_~`" else character for character in text)


class Command:
    """Runs a command with the event as JSON on stdin."""

    def __init__(self, command: str, *, timeout_seconds: float) -> None:
        """Take a line for the shell; nothing of an event is ever part of it."""
        self._command = command
        self._timeout_seconds = timeout_seconds
        self.name = "the command"

    async def deliver(self, event: Event) -> None:
        """Run the command; an exit code other than 0 is an error. After the timeout it is killed."""
        environment = {name: value for name, value in os.environ.items() if name not in SECRET_VARIABLES}
        try:
            process = await asyncio.create_subprocess_exec(
                "/bin/sh",
                "-c",
                self._command,
                stdin=asyncio.subprocess.PIPE,
                env=environment | variables_of(event),
                start_new_session=True,
            )
        except OSError as error:
            raise DeliveryError(f"cannot be started: {error.strerror}") from None
        running = asyncio.ensure_future(process.communicate(_to_json(event.envelope) + b"\n"))
        try:
            await asyncio.wait({running}, timeout=self._timeout_seconds)
            if process.returncode is None:
                raise DeliveryError(f"did not end within {self._timeout_seconds:g} s, and was killed")
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            running.cancel()
            await asyncio.wait({running, asyncio.ensure_future(process.wait())})
        if process.returncode:
            how = f"exited with {process.returncode}" if process.returncode > 0 else f"got signal {-process.returncode}"
            raise DeliveryError(how)


def variables_of(event: Event) -> dict[str, str]:
    """Return the variables that describe an event. They have other names than those that set flags."""
    job = event.job
    texts = {
        "ID": event.id,
        "TYPE": event.attributes["type"],
        "TIME": event.attributes["time"],
        "JOB_ID": job.id,
        "JOB_NAME": job.name,
        "JOB_STATE": job.state.word,
        "JOB_REASON": job.reason,
        "JOB_ERROR": job.error.message if job.error is not None else "",
        "JOB_ATTEMPT": str(job.attempt),
        "JOB_PARENT_ID": job.parent_id,
    }
    return {f"JOBSTATUS_EVENT_{name}": value for name, value in texts.items()}


def _to_json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


class _Receiver:
    """An HTTP server to which requests are sent, each on a connection of its own. Redirects are not followed."""

    def __init__(self, url: str, timeout_seconds: float) -> None:
        self._url = parse_url(url)
        self._timeout_seconds = timeout_seconds
        self._tls = ssl.create_default_context() if self._url.scheme == "https" else None
        port = "" if self._url.port is None else f":{self._url.port}"
        host = f"[{self._url.hostname}]" if ":" in (self._url.hostname or "") else self._url.hostname
        self.name = f"{self._url.scheme}://{host}{port}"

    async def post(self, headers: Mapping[str, str], body: bytes) -> None:
        """Send a request, and raise DeliveryError unless the answer is 2xx within the timeout."""
        connection, is_over = self._connect(), threading.Event()
        exchange = asyncio.ensure_future(_in_thread(lambda: self._exchange(connection, headers, body, is_over)))
        try:
            await asyncio.wait({exchange}, timeout=self._timeout_seconds)
            if not exchange.done():
                raise DeliveryError(f"no answer within {self._timeout_seconds:g} s")
            status, reason, retry_after = exchange.result()
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a host's name is too long
            text = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise DeliveryError(f"the request failed: {text}") from None
        finally:
            exchange.cancel()
            is_over.set()
            connected = connection.sock  # the thread may take it away at any time
            if connected is not None:
                # Ends the thread, if it still waits.
                with contextlib.suppress(OSError):
                    connected.shutdown(socket.SHUT_RDWR)
        if not 200 <= status < 300:
            what = "; redirects are not followed" if 300 <= status < 400 else ""
            seconds = _seconds_of(retry_after)
            raise DeliveryError(f"the answer was {status} {reason}"[:200] + what, retry_after_seconds=seconds)

    def _connect(self) -> http.client.HTTPConnection:
        host, port, timeout = self._url.hostname or "", self._url.port, self._timeout_seconds
        if self._tls is not None:
            return http.client.HTTPSConnection(host, port, timeout=timeout, context=self._tls)
        return http.client.HTTPConnection(host, port, timeout=timeout)

    def _exchange(
        self, connection: http.client.HTTPConnection, headers: Mapping[str, str], body: bytes, is_over: threading.Event
    ) -> tuple[int, str, str]:
        path = (self._url.path or "/") + (f"?{self._url.query}" if self._url.query else "")
        with contextlib.closing(connection):
            connection.connect()
            # From here on, `post` ends the connection itself. Sent later, the event could come after the next ones.
            if is_over.is_set():
                raise OSError("the time for the request is over")
            connection.request("POST", path, body, {"User-Agent": "jobstatus-relay", "Connection": "close", **headers})
            response = connection.getresponse()
            return response.status, response.reason, response.getheader("Retry-After") or ""


def _seconds_of(retry_after: str) -> float:
    """Return the seconds in a Retry-After header, which has these or a date; 0: there are none."""
    try:
        if retry_after.isascii() and retry_after.isdigit():
            seconds = float(retry_after[:10])
        else:
            at = parsedate_to_datetime(retry_after)
            at = at if at.tzinfo is not None else at.replace(tzinfo=timezone.utc)
            seconds = (at - datetime.now(timezone.utc)).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_SECONDS)


async def _in_thread(function: Callable[[], T]) -> T:
    """Return what `function` returns, called in a thread that does not delay the end of the process."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            result = function()
        except BaseException as error:
            settle(future.set_exception, error)
        else:
            settle(future.set_result, result)

    def settle(set_outcome: Callable[[Any], None], outcome: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(lambda: None if future.done() else set_outcome(outcome))

    threading.Thread(target=run, name="delivery", daemon=True).start()
    return await future
