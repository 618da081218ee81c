"""The command line starts fast: each command imports only its own modules."""

from __future__ import annotations

import subprocess
import sys

import pytest

SERVER_PARTS = {"jobstatus_grpc.server.app", "jobstatus_grpc.stores", "jobstatus_grpc.service", "sqlite3"}


def loaded_after(*arguments: str) -> set[str]:
    """Return the modules that a `jobstatus` with these arguments has loaded when it exits."""
    program = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
    program += f"sys.argv[1:] = {list(arguments)!r}; from jobstatus_grpc.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    return set(done.stderr.split())


def test_help_loads_neither_grpc_nor_rich():
    loaded = loaded_after("--help")
    assert "jobstatus_grpc.cli.run.command" in loaded
    assert loaded & {"grpc", "rich", "google.protobuf", *SERVER_PARTS} == set()


@pytest.mark.parametrize(
    "arguments",
    [["get"], ["list", "--name"], ["watch", "--exit-when-done", "--name"]],
    ids=lambda arguments: arguments[0],
)
def test_a_client_command_loads_no_part_of_the_server(service, new_id, arguments):
    loaded = loaded_after(*arguments, new_id(), "--address", service.address)
    assert "grpc" in loaded
    assert loaded & {"rich", "prometheus_client", *SERVER_PARTS} == set()
