"""Tokens of the clients that change: a file that is replaced, as Kubernetes does, and a command that prints one."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import grpc
import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import IdentityExpiredError, TokenCommand
from jobstatus_grpc.client import token as token_module
from jobstatus_grpc.client.endpoint import endpoint
from jobstatus_grpc.client.token import CHECK_SECONDS, COMMAND_SECONDS, RenewedToken
from tests.support.scripted_server import (
    ScriptedServer,
    a_done_job,
    a_job,
    a_stream,
    an_event,
    fail,
    refuse,
    reply,
)
from tests.support.timing import Clock

GOT = reply(pb.GetJobResponse(job=a_job()))


@pytest.fixture
def clock():
    return Clock()


def write(path, token):
    """Replace a file, as a program does that never shows half of it."""
    path.with_suffix(".new").write_text(f"{token}\n")
    path.with_suffix(".new").replace(path)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "token"
    write(path, "first")
    return path


def printing(file):
    """A command that prints the contents of a file, and adds a line to `runs` beside it."""
    code = f"open({str(file.parent / 'runs')!r}, 'a').write('run\\n'); print(open({str(file)!r}).read())"
    return TokenCommand([sys.executable, "-c", code])


def tokens(server):
    return [call["authorization"].removeprefix("Bearer ") for call in server.metadata]


def test_a_changed_file_is_read_once_a_second_at_most(file, clock):
    token = RenewedToken(file, clock)
    write(file, "second")
    assert token.current() == "first"
    clock.seconds += CHECK_SECONDS
    assert token.current() == "second"


def test_a_command_runs_once_a_minute_at_most(file, clock):
    token = RenewedToken(printing(file), clock)
    write(file, "second")
    clock.seconds += COMMAND_SECONDS - 1
    assert token.current() == "first"
    clock.seconds += 1
    assert [token.current(), token.current()] == ["second", "second"]
    assert (file.parent / "runs").read_text() == "run\nrun\n"


@pytest.mark.parametrize("bad", ["", "two words", "käse", "x" * 9000, None])
def test_a_bad_new_token_is_logged_once_and_the_one_before_stays_in_use(file, clock, caplog, bad):
    token = RenewedToken(file, clock)
    file.unlink() if bad is None else write(file, bad)
    for _ in range(3):
        clock.seconds += CHECK_SECONDS
        assert token.current() == "first"
    (warning,) = caplog.records
    assert str(file) in warning.getMessage()
    assert not bad or bad not in warning.getMessage()


def test_a_token_that_is_good_again_is_used(file, clock):
    token = RenewedToken(file, clock)
    for text in ("", "third"):
        write(file, text)
        clock.seconds += CHECK_SECONDS
        token.current()
    assert token.current() == "third"


@pytest.mark.parametrize("kind", [Path, printing])
def test_the_next_call_sends_the_new_token(connect, file, monkeypatch, kind):
    monkeypatch.setattr(token_module, "CHECK_SECONDS", 0.0)
    monkeypatch.setattr(token_module, "COMMAND_SECONDS", 0.0)
    with ScriptedServer(GetJob=[GOT]) as server:
        client = connect(server.address, token=kind(file))
        client.get("a")
        write(file, "second")
        client.get("a")
    assert tokens(server) == ["first", "second"]


FIRST = an_event(a_job(), pb.JobEventType.JOB_EVENT_TYPE_SNAPSHOT)
LAST = a_stream(an_event(a_done_job(), pb.JobEventType.JOB_EVENT_TYPE_SNAPSHOT))


@pytest.mark.parametrize("kind", [Path, printing])
@pytest.mark.parametrize(
    "end", [fail(grpc.StatusCode.UNAVAILABLE), refuse(IdentityExpiredError())], ids=["cut", "expired"]
)
def test_a_watch_that_resumes_sends_the_new_token(connect, file, monkeypatch, kind, end):
    monkeypatch.setattr(token_module, "CHECK_SECONDS", 0.0)
    monkeypatch.setattr(token_module, "COMMAND_SECONDS", 0.0)

    def cut(request, context):
        write(file, "second")
        end(request, context)

    with ScriptedServer(WatchJob=[a_stream(FIRST, then=cut), LAST]) as server:
        assert [job.done for job in connect(server.address, token=kind(file)).watch("a")] == [False, True]
    assert tokens(server) == ["first", "second"]


def test_a_watch_whose_token_has_expired_looks_for_a_new_one_at_once(connect, file):
    with ScriptedServer(WatchJob=[a_stream(FIRST, then=refuse(IdentityExpiredError())), LAST]) as server:
        watch = connect(server.address, token=printing(file)).watch("a")
        assert [job.done for job in watch] == [False, True]
    assert (file.parent / "runs").read_text() == "run\nrun\n"


def test_a_watch_whose_new_token_is_refused_too_ends(connect, file):
    expired = refuse(IdentityExpiredError())
    script = [a_stream(FIRST, then=expired), expired, LAST]
    with ScriptedServer(WatchJob=script) as server, pytest.raises(IdentityExpiredError):
        list(connect(server.address, token=file).watch("a"))
    assert len(server.metadata) == 2


def test_a_watch_whose_token_cannot_change_ends_when_it_expires(connect):
    script = [a_stream(FIRST, then=refuse(IdentityExpiredError())), LAST]
    with ScriptedServer(WatchJob=script) as server, pytest.raises(IdentityExpiredError):
        list(connect(server.address, token="first").watch("a"))


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["/no/such/program"], "the token command /no/such/program cannot be run: No such file"),
        ("sh -c 'echo no luck >&2; exit 3' secret", "the token command sh ended with exit code 3: no luck"),
        ("echo two words", "the output of the token command echo must be"),
        ("true", "the output of the token command true must be"),
    ],
)
def test_a_command_that_fails_is_one_line_without_its_arguments(command, says):
    with pytest.raises(ValueError, match=says) as caught:
        endpoint("localhost:1", token=TokenCommand(command))
    assert "\n" not in str(caught.value)
    assert "secret" not in f"{caught.value}{TokenCommand(command)!r}"


@pytest.mark.parametrize(
    ("command", "error"), [("", ValueError), ([], ValueError), ("'", ValueError), (5, TypeError), ([5], TypeError)]
)
def test_a_wrong_command_is_refused(command, error):
    with pytest.raises(error, match="the command of a token"):
        TokenCommand(command)


def test_a_missing_file_is_named(connect):
    with pytest.raises(FileNotFoundError, match="/no/such/file"):
        connect("localhost:1", token=Path("/no/such/file"))


@pytest.mark.parametrize("kind", [Path, printing])
def test_a_token_that_changes_is_not_sent_in_the_clear_to_another_machine(file, kind):
    with pytest.raises(ValueError, match="without encryption"):
        endpoint("jobs.example:1", token=kind(file))
    assert not (file.parent / "runs").exists()


def test_an_endpoint_with_a_token_file_can_be_pickled_and_shows_no_token(file):
    ours = endpoint("localhost:1", token=file)
    assert pickle.loads(pickle.dumps(ours)).metadata == (("authorization", "Bearer first"),)
    assert "first" not in repr(ours)
