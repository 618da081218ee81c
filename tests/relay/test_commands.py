"""Commands and Slack as receivers."""

from __future__ import annotations

import json
import time
from datetime import datetime, timezone

import psutil
import pytest

from jobstatus_grpc.job import Job, JobError, JobState
from jobstatus_grpc.relay.event import Event
from jobstatus_grpc.relay.targets import slack_text

NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)


@pytest.fixture
def lines(tmp_path):
    """Wait until a command has appended a number of lines to the file `out`, and return these."""

    def wait(count):
        ends_at = time.monotonic() + 20
        while len(found := (tmp_path / "out").read_text().splitlines(keepends=True)) < count or "".join(found)[
            -1:
        ] not in ("", "\n"):
            assert time.monotonic() < ends_at
        return [line.rstrip("\n") for line in found]

    (tmp_path / "out").touch()
    return wait


def test_a_command_gets_the_event_on_stdin_and_in_variables(relaying, make, lines, tmp_path):
    names = ("ID", "TYPE", "TIME", "JOB_ID", "JOB_NAME", "JOB_STATE", "JOB_REASON", "JOB_ERROR", "JOB_ATTEMPT")
    shown = " ".join(f'"$JOBSTATUS_EVENT_{name}"' for name in names)
    relaying("--exec", f"printf '%s|' {shown} >> {tmp_path}/out; cat >> {tmp_path}/out")
    job = make("FAILED", name="x; rm -rf $HOME `id`", reason="why")
    (line,) = lines(1)
    *variables, event = line.split("|")
    event = json.loads(event)
    assert variables[1:6] == [event["type"], event["time"], job.id, job.name, "failed"]
    assert (variables[0], variables[8]) == (event["id"], "1")
    assert event["data"]["id"] == job.id


def test_a_command_that_fails_is_run_again(relaying, make, lines, tmp_path):
    relay = relaying("--exec", f"echo ran >> {tmp_path}/out; test $(wc -l < {tmp_path}/out) -ge 3")
    make()
    assert lines(3) == ["ran"] * 3
    relay.wait_until_said("the command: events are delivered again")
    assert "exited with 1" in relay.said


def test_a_command_that_takes_too_long_is_killed_with_its_children(relaying, make, lines, tmp_path):
    sleep = f"sleep 30 & echo $! > {tmp_path}/pid; wait; echo late > {tmp_path}/out"
    relay = relaying("--exec", sleep, "--delivery-timeout", "300ms", "--retry-for", "0s")
    make()
    relay.wait_until_said("did not end within 0.3 s, and was killed")
    assert relay.stop() == 0
    assert lines(0) == []
    pid = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_command_that_does_not_read_gets_the_event_all_the_same(relaying, make, lines, tmp_path):
    relay = relaying("--exec", f"exec <&-; echo ran >> {tmp_path}/out")
    make(result={"text": "x" * 60_000})
    assert lines(1) == ["ran"]
    assert relay.dead_letters == []


def test_a_command_does_not_get_the_secrets_of_the_relay(relaying, make, lines, tmp_path):
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    variables = {"JOBSTATUS_WEBHOOK_SECRET": secret, "JOBSTATUS_STATE_FILE": secret}
    relaying("--exec", f"env > {tmp_path}/env; echo ran >> {tmp_path}/out", **variables)
    make()
    lines(1)
    assert secret not in (tmp_path / "env").read_text()


def test_slack_gets_a_line(relaying, receiver, make):
    relaying("--slack", f"{receiver.url}/services/T0/B0/X")
    job = make("FAILED", name="nightly")
    (received,) = receiver.wait_for(1)
    assert json.loads(received.body) == {"text": f":x: *nightly* `{job.id}` failed"}
    assert received.headers["content-type"] == "application/json"


def test_the_path_of_slack_is_not_printed(relaying, receiver, make):
    receiver.answer = lambda number, headers: (500 if number < 2 else 200, {})
    relay = relaying("--slack", f"{receiver.url}/services/T0/B0/X", "--retry-for", "0s")
    make()
    relay.wait_until_said("was given up")
    assert "/services" not in relay.said


def text_of(**fields):
    job = Job(
        **{"id": "a", "state": JobState.SUCCEEDED, "created_at": NOW, "updated_at": NOW, "finished_at": NOW, **fields}
    )
    return slack_text(Event(id="evt", source="/", job=job, data={}))


def test_the_line_for_slack_has_what_matters():
    error = JobError(13, "disk full")
    assert text_of() == ":white_check_mark: `a` succeeded"
    assert (
        text_of(state=JobState.FAILED, error=error, reason="no", attempt=3) == ":x: `a` failed (attempt 3): disk full"
    )
    assert text_of(state=JobState.CANCELLED, reason="by Ann") == ":no_entry_sign: `a` cancelled: by Ann"
    assert text_of(state=JobState.IN_PROGRESS, finished_at=None) == ":information_source: `a` in progress"


def test_a_job_can_neither_mention_anybody_nor_format_the_line():
    text = text_of(name="<!channel> & *b*", reason="a\nb " + "x" * 1000)
    assert "&lt;!channel&gt; &amp; " in text
    assert "*b*" not in text
    assert "\n" not in text
    assert len(text) < 700
