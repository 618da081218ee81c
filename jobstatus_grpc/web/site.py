"""Every request of the HTTP gateway: who may send it, its route, and the header fields of its response."""

from __future__ import annotations

import functools
import ipaddress
import json
import logging
import re
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from jobstatus_grpc.errors import InternalError, JobStatusError
from jobstatus_grpc.web import openapi
from jobstatus_grpc.web.calls import Call
from jobstatus_grpc.web.gateway import Gateway, Identify
from jobstatus_grpc.web.http import (
    UNCOUNTED_BODY_BYTES,
    DisconnectedError,
    HttpError,
    Receive,
    Request,
    Route,
    Send,
    respond_problem,
)
from jobstatus_grpc.web.jobs import JobsApi

log = logging.getLogger("jobstatus_grpc.server")

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")

SECURITY_FIELDS: Sequence[tuple[bytes, bytes]] = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        b"manifest-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)

CORS_REQUEST_FIELDS = (
    "authorization, content-type, x-jobstatus-tenant, x-request-id, connect-protocol-version, connect-timeout-ms, "
    "grpc-timeout, x-grpc-web, x-user-agent, if-match, if-none-match, prefer, idempotency-key, last-event-id, "
    "traceparent, tracestate"
)

CORS_RESPONSE_FIELDS = (
    "grpc-status, grpc-message, grpc-status-details-bin, etag, link, location, retry-after, preference-applied, "
    "x-jobstatus-unreachable"
)

CORS_MAX_AGE_SECONDS = 7200
"""Time for which a browser keeps the answer to a preflight: the most that Chromium does."""

MAX_TOKEN_CHARACTERS = 3500
"""Of a token in a cookie, percent-encoded. Browsers limit a cookie to 4,096 bytes with its attributes."""

_TOKEN = re.compile(r"[!-~]+", re.ASCII)
"""What a bearer token may be."""

_PLAIN_IN_COOKIE = "~+/="
"""Characters of the token68 of RFC 9110, with those that `quote` never encodes. A cookie has all others encoded."""


class Site:
    """The application that the listener runs."""

    def __init__(
        self,
        gateway: Gateway,
        jobs: JobsApi,
        *,
        identify: Identify | None,
        hold_body: Callable[[Call, int], Awaitable[Callable[[], None]]],
        origins: Sequence[str],
        is_loopback: bool,
    ) -> None:
        """Take what answers RPCs.

        Args:
            gateway: answers RPCs.
            jobs: answers `/v1/jobs…`.
            identify: identifies the caller of a login. None: the server has no authentication.
            hold_body: counts the bytes of a large body for the caller of a call, and returns what frees them; raises
                the error that refuses the caller.
            origins: other origins whose pages may call, each `scheme://host[:port]`.
            is_loopback: the listener is for this machine alone. Then the host that a request is for must be this
                machine too: a page of another name that resolves to it, by DNS rebinding, may call nothing.
        """
        self._gateway = gateway
        self._jobs = jobs
        self._identify = identify
        self._hold_body = hold_body
        self._origins = frozenset(origins)
        self._is_loopback = is_loopback
        self.routes: dict[str, Mapping[str, Route]] = {
            "/login": {"POST": self._log_in},
            "/logout": {"POST": self._log_out},
            "/openapi.json": {"GET": self._describe},
        }
        """By path and method."""

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer a request, as an ASGI application."""
        request = Request(scope, receive, send)
        request.send = self._with_fields(request, send)
        request.hold_body = functools.partial(self._hold_body, Call(request))
        try:
            try:
                await self._answer(request)
            except (HttpError, JobStatusError) as error:
                if request.is_started:
                    raise
                await respond_problem(request, error)
        except DisconnectedError:
            request.connection.abort()
        except Exception:
            error_id = uuid.uuid4().hex
            log.exception("%s %s failed; error id %s", request.method, request.path[:200], error_id)
            if request.is_started:
                request.connection.abort()
                return
            text = f"the server failed; its log has the details under the id {error_id}"
            await respond_problem(request, InternalError(text, error_id=error_id))
        finally:
            for callback in request.done_callbacks:
                callback(None)

    async def _answer(self, request: Request) -> None:
        _check_length(request)
        self._check_host(request)
        is_own = self._check_origin(request)
        routes = self._routes_of(request.path)
        if routes is None:
            raise HttpError(HTTPStatus.NOT_FOUND, f"nothing is at {request.path[:200]}")
        allowed = ", ".join([*routes, *(["HEAD"] if "GET" in routes else []), "OPTIONS"])
        if request.method == "OPTIONS":
            await self._answer_preflight(request, allowed)
            return
        self._use_cookie(request, is_own=is_own)
        answer = routes.get("GET" if request.method == "HEAD" else request.method)
        if answer is None:
            text = f"{request.path[:200]} takes {allowed}"
            raise HttpError(HTTPStatus.METHOD_NOT_ALLOWED, text, fields=[("allow", allowed)])
        await answer(request)

    def _routes_of(self, path: str) -> Mapping[str, Route] | None:
        if path in self._gateway.rpcs:
            return {"POST": self._gateway.answer}
        return self.routes.get(path) or self._jobs.routes_of(path)

    def _check_host(self, request: Request) -> None:
        if not self._is_loopback:
            return
        host = request.header("host") or ""
        if _is_this_machine(host) or any(urlsplit(origin).netloc == host for origin in self._origins):
            return
        text = f"the host {host[:200]} is not this machine; use 127.0.0.1 or localhost, or add it with --http-origin"
        raise HttpError(HTTPStatus.MISDIRECTED_REQUEST, text)

    def _check_origin(self, request: Request) -> bool:
        """Return whether the request may be from a page of this site; refuse one that writes from another's."""
        origin = request.header("origin")
        if origin is None:
            # Browsers send it with every request that writes: without it, only a read can be from a page.
            return request.method in SAFE_METHODS and request.header("sec-fetch-site") in (None, "same-origin", "none")
        scheme, _, host = origin.partition("://")
        is_named = origin in self._origins
        # Behind a proxy that terminates TLS the scheme is another one, and has to be named.
        has_scheme = scheme == ("https" if request.is_https else "http")
        if host == request.header("host") and (has_scheme or is_named):
            return True
        if not is_named and request.method not in SAFE_METHODS:
            text = f"pages of {origin[:200]} may not call this server; start it with --http-origin to allow that"
            raise HttpError(HTTPStatus.FORBIDDEN, text)
        return False

    def _use_cookie(self, request: Request, *, is_own: bool) -> None:
        """Give a request from this site's own pages the token of its login, unless it has one."""
        name = cookie_name(request)
        pairs = [
            each.strip().partition("=") for key, value in request.fields if key == "cookie" for each in value.split(";")
        ]
        tokens = [value for key, _, value in pairs if key == name]
        # A plug-in that authenticates by metadata must not see cookies.
        request.fields = [each for each in request.fields if each[0] != "cookie"]
        if len(tokens) > 1:
            raise HttpError(HTTPStatus.BAD_REQUEST, f"the request has {len(tokens)} cookies {name}; delete them")
        if not tokens or request.header("authorization") is not None:
            return
        if is_own:
            request.fields.append(("authorization", f"Bearer {unquote(tokens[0], 'latin-1')}"))
        else:
            request.ignored_cookie = _why_ignored(request)

    async def _answer_preflight(self, request: Request, allowed: str) -> None:
        fields = [("allow", allowed)]
        if request.header("origin") in self._origins:
            fields += [
                ("access-control-allow-methods", allowed),
                ("access-control-allow-headers", CORS_REQUEST_FIELDS),
                ("access-control-max-age", str(CORS_MAX_AGE_SECONDS)),
            ]
        await request.respond(HTTPStatus.NO_CONTENT, fields=fields)

    async def _log_in(self, request: Request) -> None:
        """Set a cookie with the token in the body, `{"token": …}`, if it is one of a caller."""
        if self._identify is None:
            raise HttpError(HTTPStatus.NOT_FOUND, "this server has no authentication (--auth): no login is needed")
        token = _token_in(request, await request.body(max_bytes=UNCOUNTED_BODY_BYTES))
        request.fields = [each for each in request.fields if each[0] != "authorization"]
        request.fields.append(("authorization", f"Bearer {token}"))
        await self._identify(Call(request))
        await request.respond(HTTPStatus.NO_CONTENT, fields=[("set-cookie", _cookie(request, token))])

    async def _log_out(self, request: Request) -> None:
        await request.body()
        await request.respond(HTTPStatus.NO_CONTENT, fields=[("set-cookie", f"{_cookie(request, '')}; Max-Age=0")])

    async def _describe(self, request: Request) -> None:
        await request.respond(HTTPStatus.OK, "application/json", _description())

    def _with_fields(self, request: Request, send: Send) -> Send:
        origin = next((value for key, value in request.fields if key == "origin"), None)
        fields = list(SECURITY_FIELDS)
        if self._origins:
            fields.append((b"vary", b"Origin"))
        if origin in self._origins and origin is not None:
            fields += [
                (b"access-control-allow-origin", origin.encode("latin-1")),
                (b"access-control-expose-headers", CORS_RESPONSE_FIELDS.encode()),
            ]
            fields.remove((b"cross-origin-resource-policy", b"same-origin"))

        async def send_with_fields(message: Any) -> None:
            if message["type"] == "http.response.start":
                given = [*message["headers"]]
                # A response is for one caller, unless it says otherwise.
                if all(name != b"cache-control" for name, _ in given):
                    given.append((b"cache-control", b"no-store"))
                message["headers"] = [*given, *fields]
            await send(message)

        return send_with_fields


def _why_ignored(request: Request) -> str:
    """Return why the cookie of a login does not count for a request, and what to do."""
    if request.method in SAFE_METHODS or request.header("origin") is not None:
        return "the cookie of the login is ignored: the request is from a page of another origin"
    return (
        f"the cookie of the login is ignored: a {request.method} with it needs an Origin header, that of this server; "
        "or send the token as authorization: Bearer TOKEN"
    )


@functools.cache
def _description() -> bytes:
    return json.dumps(openapi.document(), ensure_ascii=False).encode()


def cookie_name(request: Request) -> str:
    """Return the name of the cookie of a login. With TLS no other host, and no page without TLS, can set one of it.

    It has the port that the browser sees: all ports of a host share their cookies.
    """
    port = re.search(r":(\d{1,5})$", request.header("host") or "", re.ASCII)
    return f"{'__Host-' if request.is_https else ''}jobstatus{f'-{port[1]}' if port else ''}"


def _cookie(request: Request, token: str) -> str:
    is_secure = request.is_https or (request.header("origin") or "").startswith("https://")
    secure = "; Secure" if is_secure else ""
    value = quote(token, safe=_PLAIN_IN_COOKIE)
    return f"{cookie_name(request)}={value}; Path=/; HttpOnly; SameSite=Strict{secure}"


def _token_in(request: Request, body: bytes) -> str:
    if request.content_type() != "application/json":
        raise HttpError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "a login is application/json",
            fields=[("accept-post", "application/json")],
        )
    try:
        token = json.loads(body)["token"]
    except (ValueError, KeyError, TypeError, RecursionError):
        token = None
    if not isinstance(token, str) or _TOKEN.fullmatch(token) is None:
        text = 'the body must be {"token": "…"} with a token of printable ASCII characters without spaces'
        raise HttpError(HTTPStatus.BAD_REQUEST, text)
    if len(quote(token, safe=_PLAIN_IN_COOKIE)) > MAX_TOKEN_CHARACTERS:
        text = f"the token is too long for a cookie: percent-encoded it has more than {MAX_TOKEN_CHARACTERS} characters"
        raise HttpError(HTTPStatus.BAD_REQUEST, text)
    return token


def _check_length(request: Request) -> None:
    """Refuse a request with two lengths: a proxy may go by the other one, and take a part of the body for a request."""
    if {"content-length", "transfer-encoding"} <= {key for key, _ in request.fields}:
        text = "the request has a content-length and a transfer-encoding; send one of them"
        raise HttpError(HTTPStatus.BAD_REQUEST, text)


@functools.lru_cache(maxsize=128)
def _is_this_machine(host: str) -> bool:
    """Return whether the Host of a request is an IP address or localhost: no name of DNS, which others control."""
    name = host.rpartition(":")[0] if re.search(r":\d*$", host) else host
    if name == "localhost":
        return True
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True
