"""`jobstatus watch` and `wait`: live, to the end, across a restart, and with its outcome as the exit code."""

from __future__ import annotations

import json
import signal
import socket
import time

import pytest

from tests.support.servers import ServerProcess

CODE_OF_STATE = {"SUCCEEDED": 0, "FAILED": 1, "ABORTED": 3, "CANCELLED": 3}


def test_watch_prints_a_line_for_each_change_where_it_is_piped(start, service, new_id):
    job_id = service.create(id=new_id(), name="backup").id
    watch = start("watch", job_id)
    assert watch.stdout.readline().split()[1:] == [job_id, "backup", "pending"]
    service.update(job_id, state="JOB_STATE_IN_PROGRESS", attempt=1)
    assert watch.stdout.readline().split()[1:] == [job_id, "backup", "in_progress"]
    service.update(job_id, progress=42, reason="part\n3")
    assert watch.stdout.readline().split()[1:] == [job_id, "backup", "in_progress", "42%", "part", "3"]
    service.update(job_id, state="JOB_STATE_FAILED", error={"message": "disk full"})
    assert "failed  42%  part 3  error: disk full (UNKNOWN)\n" in watch.stdout.readline()
    assert (watch.wait(), watch.stdout.read(), watch.stderr.read()) == (1, "", "")


def test_watch_prints_json_where_that_is_asked_for(start, service):
    job_id = service.job_in("IN_PROGRESS").id
    watch = start("watch", job_id, "--json")
    assert json.loads(watch.stdout.readline())["state"] == "JOB_STATE_IN_PROGRESS"
    service.update(job_id, state="JOB_STATE_SUCCEEDED")
    assert json.loads(watch.stdout.readline())["done"] is True
    assert watch.wait() == 0


def test_watch_goes_on_across_a_restart_of_the_server(start, cli_of, tmp_path):
    with ServerProcess(store=f"sqlite:///{tmp_path}/jobs.db") as server:
        cli = cli_of(server.address)
        job_id = cli.json("create", "--in-progress")["id"]
        watch = start("watch", job_id, by=cli)
        assert "in_progress" in watch.stdout.readline()
        server.kill()
        server.start()
        cli("update", job_id, "--progress", "42")
        assert "42%" in watch.stdout.readline()
        cli("update", job_id, "--state", "succeeded")
        assert "succeeded" in watch.stdout.readline()
        assert watch.wait() == 0


def test_watch_gives_up_on_a_lost_server_where_that_is_asked_for(start, cli_of):
    with ServerProcess() as server:
        cli = cli_of(server.address)
        watch = start("watch", "--give-up", "1s", cli.json("create")["id"], by=cli)
        watch.stdout.readline()
        server.kill()
        assert server.address in watch.stderr.readlines()[-1]
        assert watch.wait() == 4


def test_watch_of_an_unknown_job_prints_nothing_of_the_others(here, service, new_id):
    done = here("watch", service.create(id=new_id()).id, "no-such-job")
    assert (done.returncode, done.stdout) == (5, "")
    assert "no-such-job" in done.stderr


@pytest.mark.parametrize("command", ["get", "update", "cancel", "delete", "watch", "wait", "history"])
def test_no_such_job_differs_from_failure(here, command):
    assert here(command, "no-such-job").returncode == 5


def test_the_time_to_wait_is_a_variable_like_every_flag(here, service):
    done = here("wait", service.job_in("IN_PROGRESS").id, env={"JOBSTATUS_TIMEOUT": "10ms"})
    assert done.returncode == 124


@pytest.mark.parametrize(("state", "code"), CODE_OF_STATE.items())
@pytest.mark.parametrize("command", ["watch", "wait"])
def test_a_done_job_is_shown_and_its_outcome_is_the_exit_code(here, service, command, state, code):
    done = here(command, service.job_in(state).id)
    assert done.returncode == code
    assert f"  {state.lower()}" in done.stdout
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


@pytest.mark.parametrize(
    ("states", "code"),
    [(["SUCCEEDED", "SUCCEEDED"], 0), (["CANCELLED", "SUCCEEDED"], 3), (["ABORTED", "FAILED", "SUCCEEDED"], 1)],
)
def test_of_several_jobs_failed_counts_most(here, service, states, code):
    done = here("wait", *(service.job_in(state).id for state in states))
    assert (done.returncode, done.stdout.count("\n")) == (code, len(states))


def test_wait_waits_for_the_end(start, service):
    job_id = service.job_in("IN_PROGRESS").id
    wait = start("wait", job_id)
    service.update(job_id, state="JOB_STATE_SUCCEEDED")
    assert job_id in wait.stdout.read()
    assert wait.wait() == 0


def test_wait_ends_when_its_time_is_up(here, service):
    done = here("wait", "--timeout", "10ms", service.job_in("IN_PROGRESS").id)
    assert (done.returncode, done.stdout, done.stderr) == (124, "", "error: not done within 10ms\n")


def test_wait_keeps_its_time_without_a_server(offline):
    began_at = time.monotonic()
    assert offline("wait", "--timeout", "1s", "x").returncode == 4
    assert time.monotonic() - began_at < 3


def test_wait_keeps_its_time_if_the_server_does_not_answer(run_here):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began_at = time.monotonic()
        assert run_here(f"127.0.0.1:{silent.getsockname()[1]}")("wait", "--timeout", "1s", "x").returncode == 4
    assert time.monotonic() - began_at < 3


def test_an_interrupt_is_a_quiet_end(start, service):
    watch = start("watch", service.job_in("IN_PROGRESS").id)
    watch.stdout.readline()
    watch.send_signal(signal.SIGINT)
    assert (*watch.communicate(), watch.returncode) == ("", "", 130)
