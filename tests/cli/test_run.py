"""`jobstatus run`: a command as a job; no failure of the service disturbs the command."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.auth import Role
from tests.cli.conftest import COMMAND
from tests.support.auth import AuthText, bearer
from tests.support.servers import ServerProcess
from tests.support.service import Service, update_of

BLOCK_CHILD = "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])"

READ_STDERR = re.compile(r"^job (\S+)$", re.MULTILINE)


def id_in(stderr: str) -> str:
    """Return the job id that `run` printed."""
    found = READ_STDERR.search(stderr)
    assert found is not None, stderr
    return found[1]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def state_of(job: pb.JobStatus) -> str:
    return pb.JobState.Name(job.state).removeprefix("JOB_STATE_")


@pytest.mark.parametrize(
    ("script", "state", "code", "message", "reason"),
    [
        ("true", "SUCCEEDED", 0, "", ""),
        ("echo one >&2; echo two >&2; echo >&2; echo out; exit 3", "FAILED", 3, "two", "EXIT_CODE_3"),
        ("exit 124", "FAILED", 124, "exit code 124", "EXIT_CODE_124"),
        ("echo out; exit 255", "FAILED", 255, "exit code 255", "EXIT_CODE_255"),
        ("kill -KILL $$", "FAILED", 137, "killed by SIGKILL", "KILLED_BY_SIGKILL"),
        ("echo no memory >&2; kill -SEGV $$", "FAILED", 139, "killed by SIGSEGV: no memory", "KILLED_BY_SIGSEGV"),
    ],
)
def test_how_a_command_ends_is_how_its_job_ends(here, service, script, state, code, message, reason):
    done = here("run", "--", "sh", "-c", script)
    job = service.get(id_in(done.stderr))
    assert (state_of(job), done.returncode) == (state, code)
    assert (job.error.message, job.error.reason) == (message, reason)


@pytest.mark.parametrize("script", ["exit 3", "kill -SEGV $$"])
def test_the_outcome_is_the_exit_code_where_that_is_asked_for(here, offline_cli, script):
    assert here("run", "--exit-outcome", "--", "sh", "-c", script).returncode == 1
    assert offline_cli("run", "--exit-outcome", "--", "sh", "-c", script).returncode == 1


def test_a_job_is_described_by_flags(here, service):
    done = here("run", "--name", "nightly", "--label", "a=b", "--parent", "p", "--heartbeat-timeout", "off", "true")
    job = service.get(id_in(done.stderr))
    assert (job.name, dict(job.labels), job.parent_id, job.attempt) == ("nightly", {"a": "b"}, "p", 1)
    assert not job.HasField("heartbeat_timeout")


def test_a_job_is_called_as_its_command_and_looked_after(here, service):
    job = service.get(id_in(here("run", "/bin/true").stderr))
    assert (job.name, job.heartbeat_timeout.seconds) == ("true", 30)


def test_a_job_that_is_there_is_claimed(here, service, new_id):
    job_id = service.create(id=new_id(), name="backup", labels={"a": "b"}).id
    assert here("run", "--id", job_id, "true").returncode == 0
    job = service.get(job_id)
    assert (state_of(job), job.name, dict(job.labels), job.attempt) == ("SUCCEEDED", "backup", {"a": "b"}, 1)


def test_a_job_that_is_not_there_is_created_under_its_id(here, service, new_id):
    job_id = new_id()
    assert here("run", "--id", job_id, "true").returncode == 0
    assert state_of(service.get(job_id)) == "SUCCEEDED"


@pytest.mark.parametrize(("state", "code"), [("SUCCEEDED", 1), ("FAILED", 1), ("CANCELLED", 3), ("ABORTED", 3)])
def test_a_command_whose_job_is_done_is_not_run(here, service, state, code):
    done = here("run", "--id", service.job_in(state).id, "echo", "ran")
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.splitlines()[-1].endswith("the command was not run")


@pytest.mark.parametrize(
    ("command", "code"), [("no-such-command", 127), ("/no/such/command", 127), ("/etc/passwd", 126), ("/tmp", 126)]
)
@pytest.mark.parametrize("flags", [[], ["--exit-outcome"]])
def test_a_command_that_cannot_be_started_fails_its_job(here, service, new_id, command, code, flags):
    job_id = service.create(id=new_id()).id
    done = here("run", "--quiet", "--id", job_id, *flags, command)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2 if flags else code, "", 1)
    assert done.stderr.startswith(f"error: {command}: ")
    assert (state_of(service.get(job_id)), service.get(job_id).error.reason) == ("FAILED", "NOT_STARTED")


def test_a_command_that_cannot_be_started_does_not_wait_long_for_a_server_that_is_away(offline_cli):
    assert offline_cli("run", "--timeout", "1h", "no-such-command").returncode == 127


def test_a_script_that_names_no_interpreter_is_run_by_the_shell(cli, tmp_path):
    (tmp_path / "nightly").write_text('test "$1" = "a b" && exit 3')
    (tmp_path / "nightly").chmod(0o755)
    cli.environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    assert [cli("run", program, "a b").returncode for program in (str(tmp_path / "nightly"), "nightly")] == [3, 3]


def test_output_passes_untouched(cli):
    script = "import os\nfor fd in 1, 2:\n os.write(fd, bytes(range(256)) * 1024)"
    done = cli("run", "--quiet", "--", sys.executable, "-c", script, text=False)
    assert done.stdout == done.stderr == bytes(range(256)) * 1024


def test_input_passes_and_arguments_need_not_be_text(cli):
    done = cli("run", "--quiet", "--", "sh", "-c", 'cat; printf %s "$1"', "sh", b"\xff", text=False, input=b"a\x00b")
    assert done.stdout == b"a\x00b\xff"


def test_output_passes_at_once(start):
    run = start("run", "--quiet", "--", "sh", "-c", "echo ready; read line; echo $line", stdin=subprocess.PIPE)
    assert run.stdout.readline() == "ready\n"
    assert run.communicate("go on\n")[0] == "go on\n"


def test_a_command_without_a_reader_gets_a_broken_pipe(cli, service, start):
    run = start("run", "--", "yes")
    assert run.stdout.readline() == "y\n"
    run.stdout.close()
    assert service.get(id_in(run.stderr.read())).error.message == "killed by SIGPIPE"
    assert run.wait() == 141


def test_a_command_whose_output_is_lost_has_failed(cli, service, new_id):
    job_id = service.create(id=new_id()).id
    run = [*COMMAND, "run", "--quiet", "--id", job_id, "--", "echo", "the backup"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(run, env=cli.environment, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "error: stdout: No space left on device\n")
    assert service.get(job_id).error.reason == "OUTPUT_LOST"


def test_what_a_command_leaves_behind_holds_nothing_up(start, tmp_path):
    with open(tmp_path / "out", "w") as out:
        run = start("run", "--quiet", "--", "sh", "-c", "sleep 60 & echo $!", stdout=out)
    assert run.wait(timeout=30) == 0
    os.kill(int((tmp_path / "out").read_text()), signal.SIGKILL)


def test_what_a_command_leaves_behind_can_write_after_its_end(start, tmp_path):
    daemon = "while [ ! -e go ]; do sleep 0.1; done; echo out; echo error >&2; touch alive"
    with open(tmp_path / "out", "w") as out, open(tmp_path / "error", "w") as error:
        run = start("run", "--quiet", "--", "sh", "-c", f"({daemon}) &", cwd=tmp_path, stdout=out, stderr=error)
    assert run.wait(timeout=30) == 0
    (tmp_path / "go").touch()
    wait_until(lambda: (tmp_path / "out").read_text() + (tmp_path / "error").read_text() == "out\nerror\n")
    wait_until((tmp_path / "alive").exists)


@pytest.mark.parametrize("stream", [1, 2])
def test_percentages_in_the_output_are_progress(start, service, new_id, stream):
    job_id = service.create(id=new_id()).id
    script = f"for i in 10 42.5; do printf 'part %s%%\\r' $i >&{stream}; done; read line"
    run = start("run", "--id", job_id, "--", "sh", "-c", script, stdin=subprocess.PIPE)
    job = next(each.event.job for each in service.watch(job_id) if each.event.job.progress == 42.5)
    assert (job.reports_progress, job.reason) == (True, "part")
    run.communicate("\n")
    assert service.get(job_id).progress == 100


def test_a_second_phase_moves_the_progress_back(start, service, new_id):
    job_id = service.create(id=new_id()).id
    script = "echo 'fetch 100%'; read line; echo 'unpack 3%'; read line"
    run = start("run", "--id", job_id, "--", "sh", "-c", script, stdin=subprocess.PIPE)
    wait_until(lambda: service.get(job_id).progress == 100)
    run.stdin.write("\n")
    run.stdin.flush()
    wait_until(lambda: service.get(job_id).progress == 3)
    assert service.get(job_id).reason == "phase 2: unpack"
    run.communicate("\n")


def test_progress_is_what_a_pattern_says(here, service):
    done = here("run", "--progress-regex", r"(\d+) of (\d+)", "sh", "-c", "echo 50%; echo 1 of 4; exit 1")
    assert service.get(id_in(done.stderr)).progress == 25


@pytest.mark.parametrize(("pattern", "says"), [("(", "is not a regular expression"), ("a", "must have one group")])
def test_a_pattern_that_cannot_be_used_is_refused(offline, pattern, says):
    done = offline("run", "--progress-regex", pattern, "true")
    assert (done.returncode, says in done.stderr) == (2, True)


def test_percentages_are_left_alone_where_that_is_asked_for(here, service):
    job = service.get(id_in(here("run", "--no-progress", "echo", "95% done").stderr))
    assert not job.reports_progress


def test_cancel_ends_the_command_and_all_that_it_started(start, service, new_id):
    job_id = service.create(id=new_id()).id
    script = 'trap "echo stopped" TERM; (trap "echo child stopped; exit" TERM; echo ready; sleep 60) & wait; wait'
    run = start("run", "--id", job_id, "--", "bash", "-c", script)
    assert run.stdout.readline() == "ready\n"
    service.cancel(job_id)
    out, error = run.communicate()
    assert set(out.split("\n")) >= {"stopped"}
    assert (run.returncode, state_of(service.get(job_id))) == (0, "CANCELLED")
    assert "cancel requested" in error


def test_a_command_that_does_not_heed_a_cancel_is_killed(start, service, new_id):
    job_id = service.create(id=new_id()).id
    script = "trap '' TERM; echo ready; while true; do sleep 1; done"
    run = start("run", "--id", job_id, "--kill-after", "100ms", "--", "bash", "-c", script)
    assert run.stdout.readline() == "ready\n"
    service.cancel(job_id)
    run.communicate()
    assert (run.returncode, state_of(service.get(job_id))) == (137, "CANCELLED")


def test_a_cancelled_command_has_its_outcome_as_exit_code_where_that_is_asked_for(start, service, new_id):
    job_id = service.create(id=new_id()).id
    run = start("run", "--exit-outcome", "--id", job_id, "--", "sh", "-c", "echo ready; exec sleep 60")
    run.stdout.readline()
    service.cancel(job_id)
    run.communicate()
    assert (run.returncode, state_of(service.get(job_id))) == (3, "CANCELLED")


@pytest.mark.parametrize(("state", "code"), [("ABORTED", 3), ("FAILED", 1)])
def test_a_job_that_another_client_ends_ends_its_command(start, service, new_id, state, code):
    job_id = service.create(id=new_id()).id
    run = start("run", "--exit-outcome", "--id", job_id, "--", "sh", "-c", "echo ready; sleep 60")
    run.stdout.readline()
    service.update(job_id, state=f"JOB_STATE_{state}")
    assert f"another client ended the job as {state.lower()}" in run.communicate()[1]
    assert (run.returncode, state_of(service.get(job_id))) == (code, state)


def test_a_job_that_another_worker_claims_ends_our_command(start, service, new_id):
    job_id = service.create(id=new_id()).id
    run = start("run", "--id", job_id, "--", "sh", "-c", "echo ready; sleep 60")
    run.stdout.readline()
    service.update(job_id, state="JOB_STATE_IN_PROGRESS", attempt=2)
    assert "another worker has the job" in run.communicate()[1]
    assert (run.returncode, state_of(service.get(job_id))) == (143, "IN_PROGRESS")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_and_aborts_the_job(start, service, new_id, number):
    job_id = service.create(id=new_id()).id
    script = f"trap 'echo got it; exit 1' {number.name}; echo ready; while true; do sleep 0.1; done"
    run = start("run", "--id", job_id, "--", "bash", "-c", script, stdin=subprocess.PIPE)
    run.stdout.readline()
    run.send_signal(number)
    assert run.stdout.readline() == "got it\n"
    assert run.wait() == 1
    job = service.get(job_id)
    assert (state_of(job), job.reason) == ("ABORTED", f"interrupted by {number.name}")


def test_a_command_that_ends_well_when_interrupted_has_succeeded(start, service, new_id):
    job_id = service.create(id=new_id()).id
    run = start(
        "run", "--id", job_id, "--", "bash", "-c", "trap 'exit 0' TERM; echo ready; while true; do sleep 0.1; done"
    )
    run.stdout.readline()
    run.send_signal(signal.SIGTERM)
    assert run.wait() == 0
    assert state_of(service.get(job_id)) == "SUCCEEDED"


def test_a_signal_that_is_ignored_stays_so(cli):
    ignoring = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *COMMAND]
    command = [*ignoring, "run", "--quiet", "--", "sh", "-c", "kill -HUP $$; kill -HUP $PPID; echo alive"]
    done = subprocess.run(command, env=cli.environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("alive\n", 0)


@pytest.mark.parametrize("how", ["signal.signal(signal.SIGCHLD, signal.SIG_IGN)", BLOCK_CHILD])
def test_it_ends_with_its_command_however_the_end_of_a_child_is_hidden(cli, how):
    program = f"import os, signal, sys; {how}; os.execvp(sys.argv[1], sys.argv[1:])"
    hiding = [sys.executable, "-c", program, *COMMAND, "run", "--quiet", "sh", "-c", "sleep 0.1; exit 3"]
    assert subprocess.run(hiding, env=cli.environment, timeout=30, check=False).returncode == 3


def test_the_end_of_a_child_still_has_a_handler_for_a_thread_that_gets_it_late(here):
    before = signal.getsignal(signal.SIGTERM)
    assert here("run", "--quiet", "/etc/passwd").returncode == 126
    assert callable(signal.getsignal(signal.SIGCHLD))
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    "number", ["USR1", "USR2", "ALRM", "VTALRM", "PROF", "IO", "PWR", "ABRT", "RTMIN+3", "SEGV", "BUS", "ILL", "FPE"]
)
def test_a_signal_that_would_end_us_alone_is_passed_on(start, service, new_id, number):
    job_id = service.create(id=new_id()).id
    script = f"trap 'echo got it' {number}; echo ready; until read line; do :; done; exit 1"
    run = start("run", "--id", job_id, "--", "bash", "-c", script, stdin=subprocess.PIPE)
    run.stdout.readline()
    subprocess.run(["bash", "-c", f"kill -{number} {run.pid}"], check=True)
    assert run.stdout.readline() == "got it\n"
    run.communicate("\n")
    assert (run.returncode, state_of(service.get(job_id))) == (1, "FAILED")


def test_a_command_that_a_forwarded_signal_ends_is_aborted(start, service, new_id):
    job_id = service.create(id=new_id()).id
    run = start("run", "--id", job_id, "--", "sh", "-c", "echo ready; exec sleep 60")
    run.stdout.readline()
    run.send_signal(signal.SIGUSR1)
    assert run.wait(timeout=30) == 128 + signal.SIGUSR1
    assert service.get(job_id).reason == "interrupted by SIGUSR1"


def test_it_reaps_orphans_as_process_1(cli):
    namespace = ["unshare", "--pid", "--fork", "--mount-proc"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("no right to make a PID namespace")
    script = "(sleep 0.1 &); sleep 1; grep -l '^State:.Z' /proc/[0-9]*/status; echo $PPID"
    command = [*namespace, *COMMAND, "run", "--quiet", "--", "sh", "-c", script]
    done = subprocess.run(command, env=cli.environment, capture_output=True, text=True, timeout=30, check=False)
    assert (done.stdout, done.returncode) == ("1\n", 0)


def test_a_command_finds_its_job_and_its_server(cli, service, new_id):
    job_id = service.create(id=new_id()).id
    us = shlex.join(COMMAND)
    script = f"{us} update $JOBSTATUS_JOB_ID --progress 40 && {us} update $JOBSTATUS_JOB_ID --attempt 0 --reason half"
    del cli.environment["JOBSTATUS_ADDRESS"]
    flags = ["--no-progress", "--address", cli.address, "--id", job_id]
    done = cli("run", *flags, "sh", "-c", f"({script}) >&2; echo $JOBSTATUS_ATTEMPT; exit 1")
    job = service.get(job_id)
    assert (done.stdout, job.progress, job.reason) == ("1\n", 40, "half")


def test_the_attempt_of_a_command_is_not_that_of_other_jobs(cli, service):
    other, waiting = service.job_in("RETRYING").id, service.create().id
    us = shlex.join(COMMAND)
    script = f"{us} update {other} --reason x && {us} update {waiting} --claim"
    assert cli("run", "sh", "-c", script).returncode == 0
    assert (service.get(other).reason, service.get(waiting).attempt) == ("x", 1)


def test_what_a_command_tracks_and_runs_is_part_of_its_job(cli, service, new_id):
    job_id = service.create(id=new_id()).id
    program = """if True:
        import jobstatus_grpc, os
        for address in (), (os.environ["JOBSTATUS_ADDRESS"],), ("dns:///" + os.environ["JOBSTATUS_ADDRESS"],):
            with jobstatus_grpc.JobStatusClient(*address) as client, client.track("step") as job:
                print(job.id)
    """
    python, us = shlex.join([sys.executable, "-c", program]), shlex.join(COMMAND)
    settings = {"JOBSTATUS_ID": job_id, "JOBSTATUS_NAME": "nightly"}
    done = cli("run", "--quiet", "sh", "-c", f"{python}; {us} run true 2>&1", env=settings)
    *tracked, run = [service.get(line.split()[-1]) for line in done.stdout.splitlines()]
    assert [job.parent_id for job in tracked] == [job_id, job_id, ""]
    assert (run.parent_id, run.name) == (job_id, "true")


def test_a_command_has_no_attempt_while_no_server_is_reached(offline_cli):
    done = offline_cli("run", "--quiet", "sh", "-c", "echo ${JOBSTATUS_ATTEMPT-none}", env={"JOBSTATUS_ATTEMPT": "7"})
    assert done.stdout == "none\n"


def test_without_a_server_a_command_runs_all_the_same(offline_cli):
    done = offline_cli("run", "--quiet", "--", "sh", "-c", "echo out; exit 3")
    assert (done.stdout, done.returncode) == ("out\n", 3)
    start, end = done.stderr.splitlines()
    assert start.startswith(f"jobstatus: no answer from {offline_cli.address}: ")
    assert start.endswith("Connection refused; the command runs anyway")
    assert "the outcome FAILED could not be reported: " in end


def test_a_command_whose_token_is_refused_prints_no_id_of_a_job(run_here, tmp_path):
    auth = AuthText(tmp_path / "auth.toml")
    auth.admit("ci", Role.OPERATOR)
    with ServerProcess("--auth", str(auth.path)) as server:
        done = run_here(server.address)("run", "--", "true")
    assert re.fullmatch("jobstatus: the job is not reported: .*; the command runs anyway\n", done.stderr)


@pytest.fixture
def limited(cli_of, tmp_path):
    """`jobstatus` with a server that refuses updates for these seconds, because their rate is limited."""
    auth = AuthText(tmp_path / "auth.toml")
    token = auth.admit("ci", Role.OPERATOR)
    auth.add("limits", "[limits]\nupdates_per_second = 1")
    with ServerProcess("--auth", str(auth.path)) as server:

        def limited(seconds):
            cli = cli_of(server.address)
            cli.environment["JOBSTATUS_TOKEN"] = token
            service = Service(server.address, metadata=bearer(token))
            service.batch(*[update_of("a")] * (seconds + 1))
            service.close()
            return cli

        yield limited


@pytest.mark.slow
def test_a_job_that_a_limited_server_refuses_until_its_end_is_reported_late(limited):
    cli = limited(5)
    done = cli("run", "--", "true")
    assert cli.json("get", id_in(done.stderr))["state"] == "JOB_STATE_SUCCEEDED"


def test_an_outcome_that_a_limited_server_refuses_to_the_end_is_one_line(limited):
    done = limited(400)("run", "--quiet", "--timeout", "500ms", "--", "true")
    start, end = done.stderr.splitlines()
    assert start.startswith("jobstatus: the job is reported late: the principal ci has reached its limit")
    assert "the outcome SUCCEEDED could not be reported: " in end


@pytest.mark.slow
def test_a_server_that_does_not_answer_holds_up_no_command(cli_of):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        cli = cli_of(f"127.0.0.1:{silent.getsockname()[1]}")
        done = cli("run", "--quiet", "--", "echo", "ran")
    assert (done.stdout, done.returncode) == ("ran\n", 0)


def test_a_server_that_comes_later_gets_the_job(start, cli_of, tmp_path):
    address = f"unix:{tmp_path}/jobs.sock"
    cli = cli_of(address)
    run = start("run", "--", "sh", "-c", "echo ready; read line", by=cli, stdin=subprocess.PIPE)
    run.stdout.readline()
    job_id = id_in(run.stderr.readline())
    with ServerProcess(listen=address):
        while "reported from now on" not in run.stderr.readline():
            pass
        run.communicate("\n")
        assert cli.json("get", job_id)["state"] == "JOB_STATE_SUCCEEDED"


def test_a_restart_of_the_server_is_survived(start, cli_of, tmp_path):
    with ServerProcess(store=f"sqlite:///{tmp_path}/jobs.db") as server:
        cli = cli_of(server.address)
        run = start("run", "--", "sh", "-c", "echo ready; read line", by=cli, stdin=subprocess.PIPE)
        run.stdout.readline()
        server.restart()
        job_id = id_in(run.communicate("\n")[1])
        assert (run.returncode, cli.json("get", job_id)["state"]) == (0, "JOB_STATE_SUCCEEDED")


def test_a_server_that_is_gone_for_good_is_reported_and_changes_no_exit_code(start, cli_of):
    with ServerProcess() as server:
        script = "echo ready; read line; exit 3"
        run = start(
            "run", "--timeout", "200ms", "--", "sh", "-c", script, by=cli_of(server.address), stdin=subprocess.PIPE
        )
        run.stdout.readline()
        server.kill()
    error = run.communicate("\n")[1]
    assert "could not be reported" in error
    assert run.returncode == 3
