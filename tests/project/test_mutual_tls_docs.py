"""The commands of docs/security.md, from nothing to mutual TLS, run as written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.servers import TRANSPORT

ADDRESS = "0.0.0.0:50051"


def commands(text, title):
    """The commands of the first console block of a section, each with its continued lines."""
    block = re.search(rf"^## {title}$.*?```console\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    assert block is not None
    return re.findall(r"^\$ ((?:.*\\\n)*.*)$", block[1], re.MULTILINE)


@pytest.mark.skipif(TRANSPORT == "native", reason="the native transport has no TLS")
def test_from_nothing_to_mutual_tls(root, tmp_path):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": path, "HOME": str(tmp_path), "JOBSTATUS_STORE": "memory:"}
    settings = {"env": environment, "cwd": tmp_path, "text": True}
    install, tls, token, serve, *calls = commands((root / "docs/security.md").read_text(), "From nothing to mutual TLS")
    assert install.startswith("pip install")
    for command in (tls, token):
        subprocess.run(command, shell=True, check=True, timeout=30, **settings)
    listening = "exec " + serve.removesuffix("&").replace(ADDRESS, "127.0.0.1:0")
    with subprocess.Popen(listening, shell=True, stdout=subprocess.PIPE, **settings) as server:
        try:
            assert server.stdout is not None
            port = server.stdout.readline().strip().rpartition(":")[2]
            said = [
                subprocess.run(
                    each.replace("50051", port), shell=True, check=True, timeout=30, stdout=subprocess.PIPE, **settings
                ).stdout
                for each in calls
            ]
        finally:
            server.terminate()
    assert re.search(r"^principal +me$", said[-1], re.MULTILINE)
