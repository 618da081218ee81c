"""`import jobstatus_grpc` is for clients: it must stay light."""

from __future__ import annotations

import sys

USE_EVERY_NAME = "from jobstatus_grpc import *; import sys; print(*sys.modules)"
NOT_FOR_CLIENTS = (
    "click",
    "jobstatus_grpc.cli",
    "jobstatus_grpc.commit_queue",
    "jobstatus_grpc.server",
    "jobstatus_grpc.stores",
    "jobstatus_grpc.service",
    "jobstatus_grpc.watch.job_watch",
    "prometheus_client",
    "rich",
    "sqlite3",
)


def test_importing_the_package_loads_neither_the_server_nor_the_command_line(run, tmp_path):
    loaded = run(sys.executable, "-c", USE_EVERY_NAME, folder=tmp_path).split()
    assert "jobstatus_grpc.client" in loaded
    assert [name for name in NOT_FOR_CLIENTS if name in loaded] == []
