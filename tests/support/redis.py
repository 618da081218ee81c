"""A Redis of a test's own, on a Unix socket."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


def redis_socket() -> Iterator[Path]:
    """Start Redis, without a file; skip the test if it is not installed."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed: make redis")
    # Not pytest's own folder, whose path may be too long for a socket.
    with tempfile.TemporaryDirectory(prefix="redis-") as folder:
        socket = Path(folder) / "redis.sock"
        command = ["redis-server", "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", folder]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            assert any("ready to accept connections" in line.lower() for line in process.stdout)
            yield socket
        finally:
            process.kill()
            process.communicate(timeout=10)
