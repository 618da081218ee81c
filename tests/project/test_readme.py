"""The commands and code of README.md and of the pages of docs/ that continue it work as written."""

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
def read(root):
    def joined(*names):
        return "\n".join((root / name).read_text() for name in names)

    return joined


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


def test_the_python_about_the_client_runs(read, server):
    blocks = re.findall(r"```python\n(.*?)```", read("README.md", "docs/python.md"), re.DOTALL)
    said = [run(["python", "-W", "error", "-c", block], server) for block in blocks]
    assert len(said) == 4
    assert said[0] == "succeeded\n"
    assert said[1].splitlines()[-1].startswith("succeeded")
    assert said[2].splitlines() == ["0 open", "100 in all", "SYNCED"]
    assert said[3] == "retrying\n"


def test_the_python_about_operations_runs(read, server):
    (block,) = re.findall(r"```python\n(.*?)```", read("docs/operations.md"), re.DOTALL)
    assert "rows: 100.0" in run(["python", "-c", block], server).splitlines()


def test_the_lines_of_grpcurl_run(read, server):
    lines = re.findall(r"^\$ (grpcurl .*)$", read("README.md", "docs/api.md"), re.MULTILINE)
    commands = [shlex.split(line) for line in lines]
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


def test_every_command_and_flag_in_the_documentation_exists(read, server):
    verbs = re.search(r"`jobstatus (serve \|.*?)`", read("docs/command-line.md"), re.DOTALL)
    assert verbs is not None
    for verb in verbs[1].split("|"):
        run(["jobstatus", verb.strip(), "--help"], server)
    printed = run(["jobstatus", "serve", "--help"], server)
    table = read("docs/server.md").partition("| flag of `serve`")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(--[a-z-]+)`", table)) == set(re.findall(r"^  (--[a-z-]+)", printed, re.MULTILINE))


def test_the_links_between_the_pages_lead_somewhere(root):
    pages = [*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("examples/*.md")]
    texts = {page: re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL) for page in pages}
    for page, text in texts.items():
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), (page.name, link)
            assert not anchor or anchor in anchors_of(texts[target]), (page.name, link)


def anchors_of(text):
    """As GitHub makes them of the headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
