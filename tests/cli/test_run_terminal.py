"""`jobstatus run` in a terminal: the command has a terminal of its own, which behaves as ours does."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from jobstatus.v1 import job_status_pb2 as pb

from tests.cli.conftest import COMMAND
from tests.support.pseudo_terminal import PseudoTerminal

CTRL_C, CTRL_S, CTRL_Q, CTRL_Z, ESCAPE = "\x03", "\x13", "\x11", "\x1a", "\x1b"

CURSES = """
import curses
def getkey(screen):
    screen.timeout(100)  # ncurses misses a change of the size that comes just before it reads: it has to look again
    while True:
        try:
            return screen.getkey()
        except curses.error:
            pass
def main(screen):
    row, key = 0, f"{curses.LINES} x {curses.COLS}"
    while key != "q":
        screen.addstr(row, 0, f"<{key}>")
        key, row = getkey(screen), row + 1
        if key == "KEY_RESIZE":
            key = "{} x {}".format(*screen.getmaxyx())
curses.wrapper(main)
"""

RAW = """
import os, tty
tty.setraw(0)
print("ready", end="", flush=True)
print(os.read(0, 10))
"""

WRAPPER_PID = "$(ps -o ppid= -p $PPID)"
"""For a shell that `jobstatus run` runs in a terminal; its parent is the leader of its session."""


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


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


def stop_and_continue(shell: PseudoTerminal, between: str = "echo he''re", name: str = "bash script") -> None:
    """Press Ctrl-Z, run a command, and bring the job back; the shell names it when it stops and when it goes on."""
    shell.type(CTRL_Z)
    shell.read_until("Stopped")
    shell.type(f"{between}\n")
    shell.read_until("here")
    shell.type("fg\n")
    shell.read_until(name)


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
    shell.read_until("> ")
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


def bring_back_from_the_background(shell: PseudoTerminal, started: Path, command: str) -> None:
    """Start a command that creates `started` and reads while the shell edits its line; then `stty erase ^B; fg`."""
    shell.type(f"{command} &\n")
    wait_until(started.exists)
    shell.type("until jobs -s | grep -q script; do sleep 0.1; done; stty erase ^B; fg\n")
    shell.read_until("bash script\r\n")
    shell.type("1\n")


def test_a_command_started_in_the_background_gets_the_modes_that_the_terminal_has_at_fg(shell, tmp_path):
    (tmp_path / "script").write_text("touch started; read x; stty -a\n")
    bring_back_from_the_background(shell, tmp_path / "started", "jobstatus run --quiet -- bash script")
    shell.read_until("erase = ^B;")
    shell.read_until(" icanon iexten echo ")


def test_the_terminal_is_as_at_fg_if_we_are_killed_after_a_start_in_the_background(shell, tmp_path):
    (tmp_path / "inner").write_text(f"touch started; read x; kill -KILL {WRAPPER_PID}; read x\n")
    same = "until stty -a | grep -q ' icanon'; do sleep 0.1; done; stty -a"
    (tmp_path / "script").write_text(f"{shlex.join(COMMAND)} run --quiet -- bash inner; {same}\n")
    bring_back_from_the_background(shell, tmp_path / "started", "bash script")
    shell.read_until("erase = ^B;")
    shell.read_until(" icanon iexten echo ")


@pytest.mark.parametrize("script", ["echo ready; read x", "read -p ready x; read x"])
def test_ctrl_z_does_nothing_without_a_shell_that_could_continue_us(terminal, script):
    screen = terminal("run", "--quiet", "--", "bash", "-c", f"{script}; echo end")
    screen.read_until("ready")
    screen.type(CTRL_Z)
    screen.type("1\n2\n")
    screen.read_until("end")
    screen.read_to_end()
    assert screen.process.wait() == 0


@needs("less")
@pytest.mark.parametrize("command", ["less lines", "sh -c 'cat lines | less'"])
def test_a_pager_gets_its_keys(shell, tmp_path, command):
    (tmp_path / "lines").write_text("".join(f"line {n}\n" for n in range(500)))
    shell.type(f"jobstatus run --quiet -- {command}\n")
    shell.read_until("line 22")
    shell.type("G")
    shell.read_until("line 499")
    shell.type("q")
    shell.read_until("> ")


def test_a_shell_controls_its_jobs(terminal, service, new_id):
    job_id = service.create(id=new_id()).id
    screen = terminal("run", "--id", job_id, "--", "bash", "--norc", "--noprofile", "-i")
    inner = 'trap \'echo con""tinued\' CONT; echo star""ted; while :; do sleep 0.1; done'
    for typed, answer in [
        ("PS1='% '\n", "% "),
        (f"bash -c {shlex.quote(inner)}\n", "started"),
        (CTRL_Z, "Stopped"),
        ("fg\n", "continued"),
        (CTRL_C, "% "),
        ("echo co''de $?\n", "code 130"),
        ("exit 3\n", "exit"),
    ]:
        screen.type(typed)
        screen.read_until(answer)
    screen.read_to_end()
    assert (screen.process.wait(), service.get(job_id).error.reason) == (3, "EXIT_CODE_3")


def test_a_curses_program_gets_its_keys_and_the_size(terminal):
    screen = terminal("run", "--quiet", "--", sys.executable, "-c", CURSES)
    screen.read_until("<24 x 100>")
    screen.type(f"{ESCAPE}OA")
    screen.read_until("<KEY_UP>")
    screen.resize(30, 90)
    screen.read_until("<30 x 90>")
    screen.type("q")
    screen.read_to_end()
    assert screen.process.wait() == 0


@needs("vim")
def test_an_editor_writes_its_file(shell, tmp_path):
    shell.type("jobstatus run --quiet -- vim -u NONE -i NONE written\n")
    shell.read_until("[New")
    shell.type("ione")
    shell.read_until("one")
    shell.type(ESCAPE)
    stop_and_continue(shell, name="jobstatus_grpc")
    shell.type("otwo")
    shell.read_until("two")
    shell.type(f"{ESCAPE}:wq\n")
    shell.read_until("> ")
    assert (tmp_path / "written").read_text() == "one\ntwo\n"


def test_a_program_that_takes_ctrl_c_as_a_key_gets_it(terminal):
    screen = terminal("run", "--quiet", "--", sys.executable, "-c", RAW)
    screen.read_until("ready")
    screen.type(CTRL_C)
    assert "b'\\x03'" in screen.read_to_end()
    assert screen.process.wait() == 0


def test_a_new_size_of_the_terminal_is_that_of_the_command(terminal):
    screen = terminal(
        "run", "--quiet", "--", "bash", "-c", "trap 'stty size; exit' WINCH; stty size; while :; do sleep 0.1; done"
    )
    screen.read_until("24 100")
    screen.resize(40, 120)
    screen.read_until("40 120")


def test_ctrl_d_is_the_end_of_the_input(terminal):
    screen = terminal("run", "--quiet", "--", "sh", "-c", "echo ready; cat; echo end")
    screen.read_until("ready")
    screen.type("\x04")
    screen.read_until("end")


def test_a_command_that_fails_after_ctrl_c_is_aborted(terminal, service, new_id):
    job_id = service.create(id=new_id()).id
    screen = terminal("run", "--id", job_id, "--", "bash", "-c", "trap 'exit 1' INT; echo ready; read x; read x")
    screen.read_until("ready")
    screen.type("x\n")
    screen.type(CTRL_C)
    screen.read_to_end()
    assert (screen.process.wait(), service.get(job_id).reason) == (1, "interrupted by SIGINT")


def test_a_command_that_goes_on_after_ctrl_c_and_fails_later_has_failed(terminal, service, new_id):
    job_id = service.create(id=new_id()).id
    screen = terminal("run", "--id", job_id, "--", "bash", "-c", "trap 'echo got it' INT; echo ready; read x; exit 1")
    screen.read_until("ready")
    screen.type(CTRL_C)
    screen.read_until("got it")
    screen.type("x\n")
    screen.read_to_end()
    assert (screen.process.wait(), service.get(job_id).state) == (1, pb.JOB_STATE_FAILED)


def test_ctrl_c_reaches_a_script_that_runs_us_too(shell, tmp_path):
    inner = f"{shlex.join(COMMAND)} run --quiet -- sh -c 'echo ready; read x'"
    (tmp_path / "script").write_text(f"trap 'echo script got it' INT; {inner}; echo af''ter $?\n")
    shell.type("bash script\n")
    shell.read_until("ready")
    shell.type(CTRL_C)
    shell.read_until("script got it")
    shell.read_until("after 130")


def test_ctrl_s_stops_the_output_and_ctrl_q_continues_it(terminal):
    script = "echo ready; read x; sleep 0.1; echo one; echo two"
    screen = terminal("run", "--quiet", "--", "bash", "-c", script)
    screen.read_until("ready")
    screen.type(f"x\n{CTRL_S}")
    assert "one" not in screen.read_for(0.5)
    screen.type(CTRL_Q)
    screen.read_until("two")
    screen.read_to_end()
    assert screen.process.wait() == 0


def test_output_is_complete_if_the_terminal_is_stopped_across_the_end(terminal, tmp_path):
    script = f"echo ready; read x; seq 1 1000; touch {tmp_path}/end"
    screen = terminal("run", "--quiet", "--", "bash", "-c", script)
    screen.read_until("ready")
    with screen.stopped():
        screen.type("x\n")
        wait_until((tmp_path / "end").exists)
        assert screen.read_for(0.5).split() == []
    assert screen.read_to_end().split() == ["x", *map(str, range(1, 1001))]
    assert screen.process.wait() == 0


def test_sigterm_ends_us_while_the_terminal_is_stopped_after_the_end(terminal, tmp_path):
    screen = terminal("run", "--quiet", "--", "bash", "-c", f"echo $$ > {tmp_path}/pid; echo ready; read x; seq 1 1000")
    screen.read_until("ready")
    with screen.stopped():
        screen.type("x\n")
        wait_until(lambda: not Path("/proc", (tmp_path / "pid").read_text().strip()).exists())
        while screen.process.poll() is None:  # one that arrives before the end is seen is the command's
            screen.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                screen.process.wait(timeout=5)
    assert screen.process.returncode == 0


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("stty raw; exit 3", 3),
        (f"kill -TERM {WRAPPER_PID}; read x", 143),
        (f"kill -SEGV {WRAPPER_PID}; read x", 139),
        (f"kill -KILL {WRAPPER_PID}; read x", 137),
        ("kill -KILL $PPID; read x", 137),
    ],
)
def test_the_terminal_is_as_before_however_we_end(cli, tmp_path, script, code):
    (tmp_path / "inner").write_text(f"echo ready; read x; {script}")
    us = f"{shlex.join(COMMAND)} run --quiet -- bash {tmp_path}/inner"
    same = 'until [ "$before" = "$(stty -g)" ]; do sleep 0.1; done'
    outer = f"before=$(stty -g); {us}; echo code $?; {same}; echo sa''me"
    with PseudoTerminal(["sh", "-c", outer], environment=cli.environment) as screen:
        screen.read_until("ready")
        screen.type("\n")
        screen.read_until(f"code {code}")
        screen.read_until("same")


def test_the_terminal_is_as_before_if_the_command_does_not_exist(shell):
    shell.type("jobstatus run --quiet no-such-command; stty | grep -c raw; stty -a | grep -o ' icanon'\n")
    shell.read_until("No such file")
    shell.read_until(" icanon")


def test_our_messages_are_lines_while_the_command_has_the_terminal(terminal, service, new_id):
    job_id = service.create(id=new_id()).id
    screen = terminal("run", "--id", job_id, "--", "bash", "-c", "echo ready; read x")
    screen.read_until("ready\r\n")
    service.cancel(job_id)
    assert "stopping the command\r\n" in screen.read_to_end()
    assert (screen.process.wait(), service.get(job_id).state) == (143, pb.JOB_STATE_CANCELLED)


def test_percentages_in_the_output_on_a_terminal_are_progress(terminal, service, new_id):
    job_id = service.create(id=new_id()).id
    screen = terminal("run", "--id", job_id, "--", "bash", "-c", "printf 'part 42.5%%\r'; read x")
    job = next(each.event.job for each in service.watch(job_id) if each.event.job.progress == 42.5)
    assert job.reason == "part"
    screen.type("\n")
    screen.read_to_end()
    assert service.get(job_id).progress == 100


def test_the_error_of_a_command_on_a_terminal_is_the_last_line(terminal, service, new_id):
    job_id = service.create(id=new_id()).id
    screen = terminal("run", "--id", job_id, "--", "sh", "-c", "echo out; echo no space >&2; echo; exit 3")
    screen.read_to_end()
    assert (screen.process.wait(), service.get(job_id).error.message) == (3, "no space")


def test_stderr_that_is_no_terminal_is_passed_on_apart(shell, tmp_path):
    shell.type("jobstatus run --quiet sh -c 'test -t 0 && test -t 1 && echo error >&2; echo ou\"\"t' 2> error\n")
    shell.read_until("out")
    wait_until(lambda: (tmp_path / "error").read_text() == "error\n")


def test_input_that_is_no_terminal_is_passed_on_as_it_is(shell):
    inner = "test -t 1 && ! test -t 0 && read x < /dev/tty; echo got $x; cat"
    shell.type(f"echo pi''pe | jobstatus run --quiet -- sh -c '{inner}'\n")
    shell.read_until("-c")
    shell.type("key\n")
    shell.read_until("got key\r\npipe")


def test_a_command_whose_output_is_no_terminal_reads_ours(shell):
    inner = "test -t 0 && ! test -t 1 && read x; echo got $x"
    shell.type(f"jobstatus run --quiet -- sh -c '{inner}' | cat\n")
    shell.type("key\n")
    shell.read_until("got key")


def test_what_a_command_leaves_behind_in_the_terminal_is_not_hung_up(shell, tmp_path):
    daemon = "while [ ! -e go ]; do sleep 0.1; done; echo da''emon; touch alive"
    shell.type(f"jobstatus run --quiet sh -c '({daemon}) & echo en\"\"d'; echo ba''ck\n")
    shell.read_until("end")
    shell.read_until("back")
    (tmp_path / "go").touch()
    shell.read_until("daemon")
    wait_until((tmp_path / "alive").exists)


@pytest.mark.parametrize("ignore", ["", "trap '' HUP; "])
def test_a_terminal_that_hangs_up_hangs_up_the_command(cli, tmp_path, ignore):
    inner = f"trap 'touch {tmp_path}/hung-up; exit' HUP; echo ready; read x || touch {tmp_path}/hung-up"
    outer = f"{ignore}{shlex.join(COMMAND)} run --quiet -- bash -c {shlex.quote(inner)}; true"
    with PseudoTerminal(["sh", "-c", outer], environment=cli.environment) as screen:
        screen.read_until("ready")
        screen.hang_up()
        wait_until((tmp_path / "hung-up").exists)


def test_a_command_is_hung_up_if_we_are_killed(terminal, tmp_path):
    # It reads nothing: the read of a terminal that is gone fails, and can do so before SIGHUP arrives.
    inner = f"trap 'touch {tmp_path}/hung-up; exit' HUP; echo ready; while :; do sleep 0.1; done"
    screen = terminal("run", "--quiet", "--", "bash", "-c", inner)
    screen.read_until("ready")
    screen.process.kill()
    wait_until((tmp_path / "hung-up").exists)


def test_a_command_that_goes_on_in_the_background_waits_for_fg_when_it_reads(shell, tmp_path):
    loop = 'until [ -e go ]; do sleep 0.1; done; echo we""nt; touch went; read x; echo "x is $x"'
    (tmp_path / "script").write_text(f"echo rea''dy; {loop}\n")
    shell.type("jobstatus run --quiet -- bash script\n")
    shell.read_until("ready")
    shell.type(CTRL_Z)
    shell.read_until("Stopped")
    shell.type("touch go; bg; until jobs -s | grep -q script; do sleep 0.1; done; ls we''nt && echo stop''ped\n")
    shell.read_until("stopped")
    shell.type("fg\n")
    shell.read_until("bash script")
    shell.type("1\n")
    shell.read_until("x is 1")


def test_sigtstp_from_another_process_suspends_the_command_too(shell, tmp_path):
    (tmp_path / "script").write_text(f"echo {WRAPPER_PID} > us; echo $$ > pid; echo rea''dy; read x; echo x is $x\n")
    shell.type("jobstatus run --quiet -- bash script\n")
    shell.read_until("ready")
    os.kill(int((tmp_path / "us").read_text()), signal.SIGTSTP)
    shell.read_until("Stopped")
    shell.type("until ps -o stat= -p $(cat pid) | grep -q ^T; do sleep 0.1; done; echo he''re\n")
    shell.read_until("here")
    shell.type("fg\n")
    shell.read_until("bash script")
    shell.type("1\n")
    shell.read_until("x is 1")


def test_a_script_that_names_no_interpreter_runs_in_a_terminal_too(terminal, tmp_path):
    (tmp_path / "script").write_text('read x; echo "x is $x"')
    (tmp_path / "script").chmod(0o755)
    screen = terminal("run", "--quiet", "--", str(tmp_path / "script"))
    screen.type("1\n")
    screen.read_until("x is 1")
    screen.read_to_end()
    assert screen.process.wait() == 0
