"""`serve --http`: when it starts, what it loads, its log and metrics, workers, and its end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import urllib.request

import pytest

from jobstatus_grpc.errors import CannotStartError
from jobstatus_grpc.server.config import ServerConfig
from tests.support.certificates import Authority
from tests.support.web import Web


def refusal_of(**settings):
    with pytest.raises(CannotStartError) as caught:
        ServerConfig(**settings).check()
    return str(caught.value)


@pytest.mark.parametrize(
    ("extra", "missing"), [("none", "encryption"), ("auth", "encryption"), ("tls", "authentication")]
)
def test_an_address_beyond_this_machine_needs_tls_and_auth(tmp_path, extra, missing):
    cert, key = Authority().issue().write(tmp_path, "server")
    more = {"none": {}, "auth": {"auth": "auth.toml"}, "tls": {"tls_cert": cert, "tls_key": key}}[extra]
    assert f"--http 0.0.0.0:0 would be open to other machines without {missing}" in refusal_of(http="0.0.0.0:0", **more)
    ServerConfig(http="0.0.0.0:0", insecure=True).check()


def test_flags_that_do_not_fit_are_refused():
    assert refusal_of(http="8080") == "--http 8080 is not an address; write HOST:PORT"
    assert refusal_of(http_origin=("https://a",)) == "--http-origin needs --http too"
    for origin in ("*", "https://a/", "a", "https://A.b", "null"):
        assert f"--http-origin {origin} is not an origin" in refusal_of(http="127.0.0.1:0", http_origin=(origin,))


def test_an_address_in_use_is_refused(web_service, web):
    command = [sys.executable, "-m", "jobstatus_grpc", "serve", "--listen", "127.0.0.1:0", "--store", "memory:"]
    done = subprocess.run(
        [*command, "--http", f"{web.host}:{web.port}"], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, "another server listens there" in done.stderr) == (2, True)


def loaded_by(*flags):
    """Return the modules of a server that has served and drained."""
    program = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
    program += "sys.argv[1:] = ['serve', '--listen', '127.0.0.1:0', '--store', 'memory:', *sys.argv[1:]]\n"
    program += "from jobstatus_grpc.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", program, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for _ in range(2 if flags else 1):
            process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        return set(process.communicate(timeout=30)[1].split())


def test_without_the_flag_nothing_of_it_is_loaded():
    with_it, without = loaded_by("--http", "127.0.0.1:0"), loaded_by()
    parts = {name for name in with_it if name.partition(".")[0] in ("uvicorn", "h11") or "jobstatus_grpc.web" in name}
    assert {"uvicorn", "jobstatus_grpc.web.site"} <= parts
    assert without & parts == set()


def test_without_the_extra_the_server_says_what_to_install():
    program = "import sys; sys.modules['uvicorn'] = None\nfrom jobstatus_grpc.cli import main; main()"
    command = [sys.executable, "-c", program, "serve", "--store", "memory:", "--http", "127.0.0.1:0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr.strip()) == (
        2, "error: --http needs an extra; pip install 'jobstatus-grpc[web]'",
    )  # fmt: skip


def test_sigterm_ends_streams_as_those_of_grpc_and_the_server_with_0(serve_web):
    service, web = serve_web()
    web.call("CreateJob", {"job": {"id": "x"}})
    streams = [web.stream("WatchJob", {"id": "x"}) for _ in range(20)]
    for stream in streams:
        next(stream)
    service.process.signal(signal.SIGTERM)
    for stream in streams:
        (end,) = stream
        assert [each["debug"].get("reason") for each in end["error"]["details"]] == ["DRAINING", None]
    assert service.process.wait() == 0


def test_calls_at_the_end_are_answered_or_unavailable(serve_web):
    service, web = serve_web()
    statuses = []

    def create_many():
        try:
            for number in range(500):
                statuses.append(web.call("CreateJob", {"job": {"id": f"{threading.get_ident()}-{number}"}}).status)
        except OSError:
            pass  # the server listens no more

    threads = [threading.Thread(target=create_many) for _ in range(4)]
    for thread in threads:
        thread.start()
    while len(statuses) < 40:
        pass
    assert service.process.terminate() == 0
    for thread in threads:
        thread.join()
    assert set(statuses) <= {200, 503}


def test_calls_are_logged_and_counted_as_those_of_grpc(serve_web, tmp_path):
    log = tmp_path / "log"
    service, web = serve_web("--log-calls", "--metrics", "127.0.0.1:0", log=log)
    web.call("GetJob", {"id": "unknown"}, x_request_id="r-1")
    web.request("POST", "/jobstatus.v1.JobStatusService/GetJob", b"{", content_type="application/json")
    metrics = urllib.request.urlopen(metrics_url_in(log), timeout=10).read().decode()
    assert any("GetJob" in line and "NotFound" in line for line in metrics.splitlines())
    assert service.process.terminate() == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    calls = [(each["code"], each["reason"]) for each in lines if each.get("method") == "GetJob"]
    assert calls == [("NOT_FOUND", "JOB_NOT_FOUND"), ("INVALID_ARGUMENT", "INVALID_FIELD")]


def metrics_url_in(log):
    (line,) = [line for line in log.read_text().splitlines() if "metrics on " in line]
    return json.loads(line)["message"].removeprefix("metrics on ")


def test_limits_of_a_caller_hold_for_both_sides_together(serve_web, auth):
    token = auth.admit("anna")
    auth.add("limits", "[limits]\nwatches = 1\n")
    _, web = serve_web("--auth", str(auth.path))
    known = Web(web.url, token=token)
    known.call("CreateJob", {"job": {"id": "x"}})
    first = known.stream("WatchJob", {"id": "x"})
    next(first)
    (end,) = known.stream("WatchJob", {"id": "x"})
    assert end["error"]["code"] == "resource_exhausted"


def test_workers_share_the_address(serve_web, postgres_url):
    service, web = serve_web("--workers", "2", store=postgres_url)
    assert web.call("CreateJob", {"job": {"id": "x"}}).status == 200
    assert {web.call("GetJob", {"id": "x"}).status for _ in range(20)} == {200}
    assert service.process.terminate() == 0
