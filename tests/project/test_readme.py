"""What the README tells to type works as it stands there."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ServerProcess

ADDRESS = "127.0.0.1:50051"


@pytest.fixture(scope="module")
def server():
    with ServerProcess() as server:
        yield server


@pytest.fixture
def readme(root):
    return (root / "README.md").read_text()


def run(command, server):
    # Scripts of the environment that runs the tests: pip, like make, puts them beside its Python.
    command = [str(Path(sys.executable).with_name(command[0])), *command[1:]]
    done = subprocess.run(
        [part.replace(ADDRESS, server.address) for part in command], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_python_in_the_readme_runs(readme, server):
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    said = [run(["python", "-W", "error", "-c", block], server) for block in blocks]
    assert len(said) == 2
    assert said[0] == "succeeded\n"
    assert said[1].splitlines()[-1].startswith("succeeded")


def test_the_grpcurl_in_the_readme_runs(readme, server):
    commands = [shlex.split(line) for line in re.findall(r"^\$ (grpcurl .*)$", readme, re.MULTILINE)]
    said = [run(command, server) for command in commands]
    assert "rpc WatchJob" in said[0]
    assert json.loads(said[-1])["event"]["job"]["done"]


def test_every_command_and_flag_in_the_readme_exists(readme, server):
    verbs = re.search(r"`jobstatus (serve \|.*?)`", readme, re.DOTALL)
    assert verbs is not None
    for verb in verbs[1].split("|"):
        run(["jobstatus", verb.strip(), "--help"], server)
    told = run(["jobstatus", "serve", "--help"], server)
    flags = re.findall(r"`(--[a-z-]+)`", readme.partition("| flag of `serve`")[2].partition("\n## ")[0])
    assert len(flags) > 8
    assert [flag for flag in flags if flag not in told] == []
