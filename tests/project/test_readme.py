"""The commands and code of the README work as written."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.servers import ServerProcess

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


def run_until_synced(command, server):
    """Run a command that ends at Ctrl-C, until it has shown everything."""
    command = [str(Path(sys.executable).with_name(command[0])), *command[1:]]
    arguments = [part.replace(ADDRESS, server.address) for part in command]
    said = ""
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while "JOB_EVENT_TYPE_SYNCED" not in said:
            said += process.stdout.readline()
        process.terminate()
    return said


def test_the_python_in_the_readme_runs(readme, server):
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    said = [run(["python", "-W", "error", "-c", block], server) for block in blocks]
    assert len(said) == 4
    assert said[0] == "succeeded\n"
    assert said[1].splitlines()[-1].startswith("succeeded")
    assert said[2].splitlines() == ["0 open", "100 in all", "SYNCED"]
    assert said[3] == "retrying\n"


def test_the_python_about_operations_runs(root, server):
    (block,) = re.findall(r"```python\n(.*?)```", (root / "docs" / "operations.md").read_text(), re.DOTALL)
    assert "rows: 100.0" in run(["python", "-c", block], server).splitlines()


def test_the_grpcurl_in_the_readme_runs(readme, server):
    commands = [shlex.split(line) for line in re.findall(r"^\$ (grpcurl .*)$", readme, re.MULTILINE)]
    said = {
        command[-1].rpartition("/")[2]: run_until_synced(command, server)
        if command[-1].endswith("/WatchJobs")
        else run(command, server)
        for command in commands
    }
    assert "rpc WatchJobs" in said["jobstatus.v1.JobStatusService"]
    assert json.loads(said["WatchJob"])["event"]["job"]["done"]
    assert "video-17" in [job["id"] for job in json.loads(said["ListJobs"])["jobs"]]
    assert len(json.loads(said["ListJobTransitions"])["transitions"]) == 3
    assert json.loads(said["DeleteJob"]) == {}
    assert '"id": "video-17"' in said["WatchJobs"]


def test_every_command_and_flag_in_the_readme_exists(readme, server):
    verbs = re.search(r"`jobstatus (serve \|.*?)`", readme, re.DOTALL)
    assert verbs is not None
    for verb in verbs[1].split("|"):
        run(["jobstatus", verb.strip(), "--help"], server)
    printed = run(["jobstatus", "serve", "--help"], server)
    flags = re.findall(r"`(--[a-z-]+)`", readme.partition("| flag of `serve`")[2].partition("\n## ")[0])
    assert len(flags) > 8
    assert [flag for flag in flags if flag not in printed] == []
