"""Who may call the HTTP gateway: hosts, origins, the login and its cookie; what every response carries."""

from __future__ import annotations

import http.cookiejar
import json
import re
import ssl
import time
import urllib.request

import pytest

from jobstatus_grpc.auth import Role
from jobstatus_grpc.auth.tokens import stanza_of
from tests.support.auth import AuthText
from tests.support.certificates import Authority
from tests.support.servers import TRANSPORT
from tests.support.web import SERVICE_PATH, Web, read_all

needs_tls = pytest.mark.skipif(TRANSPORT == "native", reason="the native transport has no TLS")

WHOAMI = f"{SERVICE_PATH}/GetCallerIdentity"
BOARD = "https://board.example"


@pytest.fixture(scope="module")
def secured(serve_module, tmp_path_factory):
    """A server with tokens, and another origin; the URL of its HTTP gateway, and the token of an operator `anna`."""
    auth = AuthText(tmp_path_factory.mktemp("auth") / "auth.toml")
    token = auth.admit("anna")
    service = serve_module("--http", "127.0.0.1:0", "--http-origin", BOARD, "--auth", str(auth.path))
    return Web(service.process.http), token


def log_in(web, token, **headers):
    return web.request("POST", "/login", {"token": token}, origin=web.url, **headers)


def cookie_of(reply):
    return reply.headers["set-cookie"].partition(";")[0]


def test_a_login_sets_a_cookie_that_pages_of_this_site_call_with(secured):
    web, token = secured
    reply = log_in(web, token)
    assert (reply.status, reply.headers["set-cookie"]) == (
        204, f"jobstatus-{web.port}={token}; Path=/; HttpOnly; SameSite=Strict",
    )  # fmt: skip
    me = web.request("POST", WHOAMI, {}, origin=web.url, cookie=f"other=1; {cookie_of(reply)}")
    assert me.json()["identity"]["principal"] == "anna"


@pytest.mark.parametrize("token", ["s3cr$t!", "%41;,\\\"'%", "a=b==c", "".join(map(chr, range(0x21, 0x7F)))])
def test_a_token_may_have_any_character_that_a_header_takes(serve_web, auth, token):
    auth.add("anna", stanza_of(token, "anna", Role.WORKER, tenant="default", expires_at=None))
    _, web = serve_web("--auth", str(auth.path))
    cookie = cookie_of(log_in(web, token))
    assert re.fullmatch(r"jobstatus-\d+=[A-Za-z0-9._~+/=%-]+", cookie)
    for known in ({"authorization": f"Bearer {token}"}, {"origin": web.url, "cookie": cookie}):
        assert web.request("POST", WHOAMI, {}, **known).json()["identity"]["principal"] == "anna"


def test_a_logout_deletes_the_cookie(secured):
    web, _ = secured
    reply = web.request("POST", "/logout", b"", origin=web.url)
    assert (reply.status, reply.headers["set-cookie"]) == (
        204, f"jobstatus-{web.port}=; Path=/; HttpOnly; SameSite=Strict; Max-Age=0",
    )  # fmt: skip


@pytest.mark.parametrize("origin", [{}, {"origin": BOARD}], ids=["none", "another"])
def test_a_cookie_counts_only_for_pages_of_this_site(secured, origin):
    web, token = secured
    reply = web.request("POST", WHOAMI, {}, cookie=f"jobstatus-{web.port}={token}", **origin)
    assert (reply.status, reply.reason) == (401, "NO_IDENTITY")


@pytest.mark.parametrize(
    ("method", "path", "fields", "why"),
    [
        ("POST", WHOAMI, {}, "a POST with it needs an Origin header"),
        ("PATCH", "/v1/jobs/x", {}, "a PATCH with it needs an Origin header"),
        ("GET", "/v1/jobs", {"origin": BOARD}, "from a page of another origin"),
        ("GET", "/v1/jobs", {"sec_fetch_site": "same-site"}, "from a page of another origin"),
    ],
)
def test_the_error_of_a_request_whose_cookie_is_ignored_says_why(secured, method, path, fields, why):
    web, token = secured
    body = None if method == "GET" else {"name": "x"}
    cookie = f"jobstatus-{web.port}={token}"
    reply = web.request(method, path, body, cookie=cookie, **fields)
    assert (reply.status, reply.reason) == (401, "NO_IDENTITY")
    assert why in reply.body.decode()
    fields["authorization"] = "Bearer x"
    assert "cookie" not in web.request(method, path, body, cookie=cookie, **fields).body.decode()


def test_behind_a_proxy_that_terminates_tls_the_origin_of_the_flag_is_this_site(secured):
    web, token = secured
    proxied = {"origin": BOARD, "host": "board.example"}
    reply = web.request("POST", "/login", {"token": token}, **proxied)
    assert (reply.status, reply.headers["set-cookie"].endswith("; Secure")) == (204, True)
    assert web.request("POST", WHOAMI, {}, cookie=cookie_of(reply), **proxied).status == 200


def test_a_header_goes_before_a_cookie(secured):
    web, token = secured
    reply = web.request(
        "POST",
        WHOAMI,
        {},
        origin=web.url,
        cookie=f"jobstatus-{web.port}={token}",
        authorization="Bearer jst_unknown",
    )
    assert (reply.status, reply.reason) == (401, "BAD_IDENTITY")


def test_two_cookies_of_our_name_are_refused(secured):
    web, token = secured
    name = f"jobstatus-{web.port}"
    assert web.request("POST", WHOAMI, {}, origin=web.url, cookie=f"{name}=x; {name}={token}").status == 400


def test_two_servers_of_one_host_do_not_log_each_other_out(serve_web, auth):
    tokens = [auth.admit(name) for name in ("anna", "ben")]
    first, second = (serve_web("--auth", str(auth.path))[1] for _ in range(2))
    jar = http.cookiejar.CookieJar()
    browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(jar))

    def post(web, path, body):
        fields = {"content-type": "application/json", "origin": web.url}
        request = urllib.request.Request(f"{web.url}{path}", json.dumps(body).encode(), fields)
        with browser.open(request, timeout=20) as reply:
            return reply.read()

    for web, token in zip((first, second), tokens, strict=True):
        post(web, "/login", {"token": token})
    assert len(jar) == 2
    found = [json.loads(post(web, WHOAMI, {}))["identity"]["principal"] for web in (first, second)]
    assert found == ["anna", "ben"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"token": "jst_unknown"}, 401),
        ({"token": ""}, 400),
        ({"token": "a; Domain=evil"}, 400),
        ({"token": "a\r\nset-cookie: x=y"}, 400),
        ({"token": "x" * 4000}, 400),
        ({"token": "$" * 1200}, 400),
        ({"token": "\u00e9"}, 400),
        ({"token": "\ud800"}, 400),
        ({"token": 5}, 400),
        ([], 400),
        (b"", 400),
        (b"[" * 60_000, 400),
        (b"[" * 100_000, 413),
    ],
)
def test_a_login_that_is_not_one_sets_no_cookie(secured, body, status):
    web, _ = secured
    reply = web.request("POST", "/login", body, origin=web.url, content_type="application/json")
    assert (reply.status, reply.headers["set-cookie"]) == (status, None)


def test_a_form_of_another_site_cannot_log_in(secured):
    web, token = secured
    form = {"content_type": "application/x-www-form-urlencoded"}
    assert web.request("POST", "/login", f"token={token}".encode(), **form).status == 415


def test_a_large_body_of_an_unknown_caller_is_not_parsed(secured):
    web, _ = secured
    reply = web.request("POST", WHOAMI, b"{" * 1_000_000, content_type="application/json")
    assert (reply.status, reply.reason) == (401, "NO_IDENTITY")


def test_no_token_is_taken_from_a_url(secured):
    web, token = secured
    assert web.request("POST", f"{WHOAMI}?token={token}&access_token={token}", {}).reason == "NO_IDENTITY"


def test_without_authentication_there_is_no_login(web):
    assert web.request("POST", "/login", {"token": "x"}).status == 404


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://[", "", "http://127.0.0.1:1"])
def test_a_page_of_another_origin_writes_nothing(web, origin):
    reply = web.call("CreateJob", {"job": {"id": "evil"}}, origin=origin)
    assert (reply.status, reply.headers["access-control-allow-origin"]) == (403, None)
    assert web.call("GetJob", {"id": "evil"}).status == 404


def test_a_page_of_this_origin_writes(web, new_id):
    assert web.call("CreateJob", {"job": {"id": new_id()}}, origin=web.url).status == 200


def test_an_origin_of_the_flag_calls_with_its_token(secured):
    web, token = secured
    preflight = web.request("OPTIONS", WHOAMI, origin=BOARD, access_control_request_method="POST")
    assert (preflight.status, preflight.headers["access-control-allow-origin"]) == (204, BOARD)
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    reply = web.request("POST", WHOAMI, {}, origin=BOARD, authorization=f"Bearer {token}")
    assert (reply.status, reply.headers["access-control-allow-origin"]) == (200, BOARD)
    assert (reply.headers["access-control-allow-credentials"], reply.headers["vary"]) == (None, "Origin")


def test_a_preflight_of_another_origin_allows_nothing(web):
    reply = web.request("OPTIONS", WHOAMI, origin="http://evil.example", access_control_request_method="POST")
    assert not [name for name in reply.headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
def test_a_name_of_dns_that_leads_to_this_machine_is_refused(web, host):
    assert web.call("ListJobs", {}, host=host).status == 421


@pytest.mark.parametrize("host", ["localhost:1", "[::1]", "127.0.0.1", "10.0.0.1:80"])
def test_addresses_of_machines_are_hosts(web, host):
    assert web.call("ListJobs", {}, host=host).status == 200


@pytest.mark.parametrize(
    ("method", "path"), [("POST", WHOAMI), ("GET", WHOAMI), ("GET", "/nothing"), ("OPTIONS", "/"), ("GET", "/login")]
)
def test_every_response_has_the_security_fields(web, method, path):
    headers = web.request(method, path).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert (headers["x-content-type-options"], headers["cache-control"]) == ("nosniff", "no-store")


@pytest.mark.parametrize(
    "path",
    [
        f"/..{WHOAMI}",
        f"/{WHOAMI}",
        WHOAMI.replace("/Get", "%2FGet"),
        WHOAMI.replace("Get", "%47et"),
        f"{WHOAMI}/",
        WHOAMI.lower(),
        "/%00",
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "*",
        f"http://127.0.0.1{WHOAMI}",
    ],
)
def test_a_path_is_taken_as_it_is(web, path):
    assert web.request("POST", path, {}).status == 404


def test_a_tenant_is_chosen_by_the_header_of_grpc(serve_web, auth):
    token = auth.admit("root", Role.ADMIN)
    _, web = serve_web("--auth", str(auth.path))
    known = {"authorization": f"Bearer {token}"}
    assert web.call("GetCallerIdentity", {}, **known, x_jobstatus_tenant="b").json()["identity"]["tenant"] == "b"
    assert web.call("CreateJob", {"job": {"id": "x"}}, **known, x_jobstatus_tenant="b").status == 200
    assert web.call("GetJob", {"id": "x"}, **known).status == 404


def test_a_role_is_refused_what_grpc_refuses_it(serve_web, auth):
    token = auth.admit("eve", Role.WATCHER)
    _, web = serve_web("--auth", str(auth.path))
    reply = web.call("CreateJob", {}, authorization=f"Bearer {token}")
    assert (reply.status, reply.reason) == (403, "NOT_ALLOWED")


def test_duplicates_of_a_header_are_refused(web, secured):
    lines = [
        f"POST {WHOAMI} HTTP/1.1", "host: 127.0.0.1", "content-type: application/json", "content-length: 2",
        "connection: close",
    ]  # fmt: skip
    for name in ("content-type: application/json", "host: evil", "content-length: 3", "origin: a\r\norigin: b"):
        request = "\r\n".join([*lines, name, "", "{}"]).encode()
        assert read_all(web.raw(request)).startswith(b"HTTP/1.1 400")
    twice = "\r\n".join([*lines, f"authorization: Bearer {secured[1]}", "authorization: Bearer x", "", "{}"])
    assert b"BAD_IDENTITY" in read_all(secured[0].raw(twice.encode()))


def test_a_stream_ends_when_its_caller_is_removed(serve_web, auth):
    auth.admit("boss")
    token = auth.admit("anna")
    service, web = serve_web("--auth", str(auth.path))
    known = {"authorization": f"Bearer {token}"}
    web.call("CreateJob", {"job": {"id": "x"}}, **known)
    stream = web.stream("WatchJob", {"id": "x"}, **known)
    assert next(stream)["event"]["job"]["id"] == "x"
    auth.remove("anna")
    (end,) = stream
    assert (end["error"]["code"], end["error"]["details"][0]["debug"]["reason"]) == ("unauthenticated", "BAD_IDENTITY")
    assert service.process.terminate() == 0


@needs_tls
def test_with_tls_the_cookie_is_secure_and_the_files_are_read_again(serve_web, auth, tmp_path):
    token, authority = auth.admit("anna"), Authority()
    cert, key = authority.issue().write(tmp_path, "server")
    tls = ssl.create_default_context(cafile=authority.write(tmp_path))
    service, plain = serve_web("--auth", str(auth.path), "--tls-cert", cert, "--tls-key", key)
    web = Web(plain.url, tls=tls)
    reply = log_in(web, token)
    assert (
        reply.headers["set-cookie"] == f"__Host-jobstatus-{web.port}={token}; Path=/; HttpOnly; SameSite=Strict; Secure"
    )
    assert web.request("POST", WHOAMI, {}, origin=web.url, cookie=cookie_of(reply)).status == 200
    other = Authority()
    other.issue().write(tmp_path, "server")
    trusting_both = ssl.create_default_context(cadata=other.pem.decode())
    until = time.monotonic() + 10
    while True:
        try:
            assert Web(plain.url, tls=trusting_both, token=token).call("GetCallerIdentity", {}).status == 200
            break
        except ssl.SSLError:
            assert time.monotonic() < until
            time.sleep(0.05)
    assert service.process.terminate() == 0


@needs_tls
def test_clients_need_the_certificates_that_grpc_asks_for(serve_web, tmp_path):
    authority = Authority()
    cert, key = authority.issue().write(tmp_path, "server")
    ca = authority.write(tmp_path)
    flags = ["--tls-cert", cert, "--tls-key", key, "--tls-client-ca", ca, "--tls-require-client-cert"]
    (tmp_path / "auth.toml").write_text('[[certificates]]\ncn = "worker"\nname = "w"\nrole = "worker"\n')
    _, plain = serve_web(*flags, "--auth", str(tmp_path / "auth.toml"))
    without = ssl.create_default_context(cafile=ca)
    with pytest.raises((ssl.SSLError, ConnectionError)):
        Web(plain.url, tls=without).call("GetCallerIdentity", {})
    having = ssl.create_default_context(cafile=ca)
    having.load_cert_chain(*authority.issue(name="worker").write(tmp_path, "client"))
    assert Web(plain.url, tls=having).call("GetCallerIdentity", {}).json()["identity"]["principal"] == "w"
