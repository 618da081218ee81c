"""The command `jobstatus verify`; tests/faults/test_no_fault.py runs it on each store and transport."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from xml.etree import ElementTree

import pytest

from jobstatus_grpc import JobStatusClient
from jobstatus_grpc.auth import Role
from jobstatus_grpc.verify import history
from tests.support.servers import ServerProcess
from tests.verify.test_checker import Recording

pytestmark = pytest.mark.slow

QUICK = ("--duration", "1s", "--patience", "1s", "--clients", "4")


@pytest.fixture(autouse=True)
def _files_of_violations(tmp_path, monkeypatch):
    """They are written to the working directory."""
    monkeypatch.chdir(tmp_path)


def test_it_says_what_was_checked_and_found_and_leaves_only_the_jobs_of_others(cli):
    with ServerProcess() as server, JobStatusClient(server.address) as client:
        client.create("mine", id="mine")
        done = cli("verify", "--address", server.address, *QUICK, "--label", "team=core")
        assert [job.id for job in client.list().jobs] == ["mine"]
    assert done.returncode == 0, done.stdout
    assert "checks, 0 failed" in done.stdout
    assert "0 violations" in done.stdout


def test_its_jobs_are_deleted_if_it_is_interrupted():
    command = [sys.executable, "-u", "-m", "jobstatus_grpc", "verify", "--duration", "1m", "--address"]
    with ServerProcess() as server, JobStatusClient(server.address) as client:
        with subprocess.Popen([*command, server.address], stdout=subprocess.PIPE, text=True) as verify:
            assert verify.stdout is not None
            while not client.list().jobs:
                time.sleep(0.01)
            verify.send_signal(signal.SIGINT)
            assert verify.wait(30) == 130
        assert client.list().jobs == ()


def test_results_are_written_for_programs(cli, tmp_path):
    files = ("--junit", str(tmp_path / "junit.xml"), "--save", str(tmp_path / "history.jsonl"))
    found = json.loads(cli("verify", *QUICK, "--json", "--seed", "7", *files).stdout)
    assert (found["passed"], found["seed"], found["violations"]) == (True, 7, [])
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert (suite.get("failures"), len(suite)) == ("0", int(suite.get("tests", 0)))
    assert len(history.read(tmp_path / "history.jsonl")) == sum(found["calls"].values())


def test_a_recorded_history_is_judged_again(cli, tmp_path):
    history.write(Recording().create().update(3, reason="b").entries, tmp_path / "history.jsonl")
    done = cli("verify", "--history", str(tmp_path / "history.jsonl"))
    assert done.returncode == 1
    assert "FAIL  revisions-are-contiguous" in done.stdout


def test_a_file_that_is_no_history_is_one_line(cli, tmp_path):
    (tmp_path / "history.jsonl").write_text("no json\n")
    done = cli("verify", "--history", str(tmp_path / "history.jsonl"))
    assert done.returncode == 2
    assert "line 1: not an entry of a history" in done.stderr


def test_an_unreachable_server_is_exit_4(cli):
    done = cli("verify", "--address", "127.0.0.1:1", "--timeout", "200ms")
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.count("no answer from 127.0.0.1:1: ") == 1


def test_a_caller_without_the_role_is_refused_before_anything_is_checked(cli_of, auth):
    token = auth.admit("reader", Role.WORKER)
    with ServerProcess("--auth", str(auth.path)) as server:
        done = cli_of(server.address)("verify", *QUICK, env={"JOBSTATUS_TOKEN": token})
    assert (done.returncode, done.stdout) == (2, "")
    assert "CancelJob" in done.stderr
    assert "operator" in done.stderr


def test_a_caller_whose_rate_is_limited_is_slower(cli_of, auth):
    token = auth.admit("ops")
    auth.add("limits", "[limits]\ncalls_per_second = 400\ncalls_burst = 20\n")
    with ServerProcess("--auth", str(auth.path)) as server:
        done = cli_of(server.address)("verify", *QUICK, env={"JOBSTATUS_TOKEN": token})
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("flag", ["--save", "--junit"])
def test_a_file_that_cannot_be_written_is_an_error_at_once(cli, tmp_path, flag):
    done = cli("verify", flag, f"{tmp_path}/none/x")
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no directory" in done.stderr


def test_an_empty_history_is_an_error(cli, tmp_path):
    (tmp_path / "history.jsonl").touch()
    done = cli("verify", "--history", str(tmp_path / "history.jsonl"))
    assert (done.returncode, "has no calls" in done.stderr) == (2, True)
