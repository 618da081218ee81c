"""A job is shown on one line, without false claims and without control sequences."""

from __future__ import annotations

import subprocess
from datetime import datetime, timedelta, timezone

import pytest

from jobstatus_grpc.cli import output
from jobstatus_grpc.cli.text import one_line
from jobstatus_grpc.job import Job, JobError, JobState
from tests.cli.conftest import COMMAND

NOW = datetime.now(timezone.utc)


def job(**fields) -> Job:
    return Job(id="a", created_at=NOW, updated_at=NOW, **{"state": JobState.IN_PROGRESS, **fields})


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0%"), (42, "42%"), (42.55, "42.5%"), (99.99, "99.9%"), (100, "100%")]
)
def test_what_is_not_yet_100_is_not_shown_as_100(value, shown):
    assert output.percent(value) == shown


@pytest.mark.parametrize(
    "text", ["a\nb", "a\r\nb", "a\x1b[31m \x1b[0mb", "a\x1b]0;title\x07 b", "a\x9b\u2028b", "  a  b "]
)
def test_text_becomes_one_line_without_commands(text):
    assert one_line(text) == "a b"


def test_the_state_says_what_is_special_about_it():
    special = job(attempt=2, stalled=True, cancel_requested=True)
    assert output.state_words(special) == "in_progress (attempt 2, cancel requested, stalled)"


def test_an_error_names_its_code_even_if_that_is_unknown():
    assert output.error_words(JobError(14, "gone", "X")) == "gone (UNAVAILABLE, X)"
    assert output.error_words(JobError(99)) == "99"


def test_the_remaining_time_is_the_workers_estimate_before_our_own():
    assert output.remaining(job(estimated_completion=NOW - timedelta(hours=1))) == timedelta(0)
    left = output.remaining(job(projected_completion=datetime.now(timezone.utc) + timedelta(days=7)))
    assert left is not None
    assert timedelta(days=6) < left <= timedelta(days=7)


def test_a_job_without_progress_and_a_done_one_have_no_remaining_time():
    assert output.remaining(job()) is None
    assert output.remaining(job(state=JobState.FAILED, estimated_completion=NOW + timedelta(hours=1))) is None


@pytest.mark.parametrize("arguments", [["--version"], ["completion", "bash"], ["list", "--json"]])
def test_output_that_cannot_be_written_is_one_error(cli, service, new_id, arguments):
    service.create(id=new_id())
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, *arguments], env=cli.environment, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (1, "error: cannot write: No space left on device\n")


def test_an_error_that_cannot_be_written_changes_no_exit_code(offline_cli):
    with open("/dev/full", "w") as full:
        command = [*COMMAND, "get", "a", "--timeout", "0.1s"]
        assert subprocess.run(command, env=offline_cli.environment, stderr=full, check=False).returncode == 4
