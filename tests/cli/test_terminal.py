"""`jobstatus` in a terminal: live bars, and commands that use the terminal themselves."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import pytest
from jobstatus.v1 import job_status_pb2 as pb

from tests.cli.conftest import COMMAND
from tests.support.pseudo_terminal import PseudoTerminal
from tests.support.servers import ServerProcess

CTRL_C, CTRL_Z = "\x03", "\x1a"


@pytest.fixture
def shell(cli, tmp_path) -> Iterator[PseudoTerminal]:
    """A terminal with an interactive shell in it, where `jobs` is ours."""
    environment = {**cli.environment, "PS1": "> ", "HISTFILE": "/dev/null"}
    with PseudoTerminal(["bash", "--norc", "--noprofile", "-i"], environment=environment) as opened:
        opened.type(
            f"cd {shlex.quote(str(tmp_path))}; alias jobstatus={shlex.quote(shlex.join(COMMAND))}; echo re''ady\n"
        )
        opened.read_until("ready")
        yield opened


def stop_and_continue(shell: PseudoTerminal, between: str = "echo he''re") -> None:
    """Press Ctrl-Z, run a command, and bring the job back; the shell names it when it stops and when it goes on."""
    shell.type(CTRL_Z)
    shell.read_until("Stopped")
    shell.type(f"{between}\n")
    shell.read_until("here")
    shell.type("fg\n")
    shell.read_until("bash script")


def test_watch_draws_a_bar_that_moves_until_the_job_is_done(terminal, service, new_id):
    job_id = service.create(id=new_id(), name="backup").id
    screen = terminal("watch", job_id)
    screen.read_until("backup")
    screen.read_until("pending")
    service.update(job_id, state="JOB_STATE_IN_PROGRESS", attempt=1)
    service.update(job_id, progress=42, reason="reading [red]part[/red] 3")
    assert "in_progress" in screen.read_until("42%")
    screen.read_until("reading [red]part[/red] 3")
    service.update(job_id, state="JOB_STATE_SUCCEEDED")
    last = screen.read_to_end().splitlines()[-1]
    assert "succeeded" in last
    assert "━━━" in last
    assert "100%" in last
    assert screen.process.wait() == 0


def test_watch_draws_a_row_for_each_job(terminal, service):
    failed = service.job_in("FAILED", name="unpack").id
    cancelled = service.job_in("CANCELLED", name="fetch").id
    screen = terminal("watch", failed, cancelled)
    rows = [row.split() for row in screen.read_to_end().splitlines()[-2:]]
    assert [row[:2] for row in rows] == [["unpack", "failed"], ["fetch", "cancelled"]]
    assert screen.process.wait() == 1


def test_the_remaining_time_stops_while_the_server_is_away(terminal, cli):
    with ServerProcess() as server:
        cli.environment["JOBSTATUS_ADDRESS"] = server.address
        job_id = cli("create", "--in-progress", "--name", "backup", "--eta", "1h", "--quiet").stdout.strip()
        screen = terminal("watch", job_id)
        screen.read_until("0:59:58")
        server.kill()
        screen.read_until("watch of job")  # was cut, for the second time
        shown = re.findall(r"0:59:\d\d", screen.read_for(3))
        assert len(set(shown)) <= 1


def test_ctrl_c_ends_watch_without_a_word(terminal, service):
    screen = terminal("watch", service.job_in("IN_PROGRESS", name="backup").id)
    screen.read_until("in_progress")
    screen.type(CTRL_C)
    assert "Traceback" not in screen.read_to_end()
    assert screen.process.wait() == 130


def test_a_command_has_a_terminal_where_we_have_one(terminal):
    screen = terminal("run", "--quiet", "--", "sh", "-c", "test -t 0 && test -t 1 && test -t 2 && tput cols")
    assert screen.read_to_end() == "100\r\n"
    assert screen.process.wait() == 0


def test_a_command_reads_the_terminal(terminal):
    screen = terminal("run", "--quiet", "--", "bash", "-c", 'read -p "name? " name; echo "got $name"')
    screen.read_until("name? ")
    screen.type("Ada\n")
    screen.read_until("got Ada")
    screen.read_to_end()
    assert screen.process.wait() == 0


@pytest.mark.parametrize("script", ["echo ready; sleep 60", 'read -p "ready" x'])
def test_ctrl_c_ends_the_command_and_aborts_its_job(terminal, service, new_id, script):
    job_id = service.create(id=new_id()).id
    screen = terminal("run", "--id", job_id, "--", "bash", "-c", script)
    screen.read_until("ready")
    screen.type(CTRL_C)
    screen.read_to_end()
    assert screen.process.wait() == 130
    job = service.get(job_id)
    assert job.state == pb.JOB_STATE_ABORTED
    assert job.reason == "interrupted by SIGINT"


def test_ctrl_z_stops_the_command_and_fg_continues_it(shell, tmp_path):
    (tmp_path / "script").write_text('mkfifo go; echo $$ > pid; echo read""y; read x < go; echo en""d\n')
    shell.type("jobstatus run --quiet -- bash script\n")
    shell.read_until("ready")
    stop_and_continue(shell, "ps -o stat= -p $(cat pid) | sed s/^T/he''re/")
    (tmp_path / "go").write_text("x\n")
    shell.read_until("end")


def test_ctrl_z_stops_a_command_that_reads_the_terminal_and_fg_continues_it(shell, tmp_path):
    (tmp_path / "script").write_text('read -p "a? " a; echo "a is $a"; read b; echo "b is $b"\n')
    shell.type("jobstatus run --quiet -- bash script\n")
    shell.read_until("a? ")
    shell.type("1\n")
    shell.read_until("a is 1")
    stop_and_continue(shell)
    shell.type("2\n")
    shell.read_until("b is 2")
    shell.type("echo back: $?\n")
    shell.read_until("back: 0")


def test_ctrl_z_stops_a_script_that_runs_us_too(shell, tmp_path):
    (tmp_path / "inner").write_text('read -p "a? " a; echo "a is $a"; read b; echo "b is $b"\n')
    (tmp_path / "script").write_text(f"{shlex.join(COMMAND)} run --quiet -- bash inner; echo af''ter\n")
    shell.type("bash script\n")
    shell.read_until("a? ")
    shell.type("1\n")
    shell.read_until("a is 1")
    stop_and_continue(shell)
    shell.type("2\n")
    shell.read_until("b is 2")
    shell.read_until("after")


def test_a_command_that_reads_the_terminal_from_the_background_waits_for_fg(shell, tmp_path):
    (tmp_path / "script").write_text('read -p "a? " a; echo "a is $a"\n')
    shell.type("jobstatus run --quiet -- bash script &\n")
    shell.type("until jobs -s | grep -q script; do sleep 0.1; done; echo stop''ped\n")
    shell.read_until("stopped")
    shell.type("fg\n")
    shell.read_until("bash script")
    shell.type("1\n")
    shell.read_until("a is 1")


@pytest.mark.parametrize("script", ["echo ready; read x", "read -p ready x; read x"])
def test_ctrl_z_does_nothing_without_a_shell_that_could_continue_us(terminal, script):
    screen = terminal("run", "--quiet", "--", "bash", "-c", f"{script}; echo end")
    screen.read_until("ready")
    screen.type(CTRL_Z)
    screen.type("1\n2\n")
    screen.read_until("end")
    screen.read_to_end()
    assert screen.process.wait() == 0
