"""`jobstatus history`: what happened, the oldest first."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def job_id(service):
    """A job that has ended after two attempts."""
    job_id = service.job_in("RETRYING").id
    service.update(job_id, state="JOB_STATE_IN_PROGRESS", attempt=2, reason="once\nmore")
    return service.update(job_id, state="JOB_STATE_SUCCEEDED").id


def test_a_line_is_a_transition(here, service, job_id):
    lines = [line.split("\t") for line in here("history", job_id).stdout.splitlines()]
    assert [fields[1:4] for fields in lines] == [
        ["", "pending", "0"],
        ["pending", "in_progress", "1"],
        ["in_progress", "retrying", "1"],
        ["retrying", "in_progress", "2"],
        ["in_progress", "succeeded", "2"],
    ]
    assert lines[0][0] == f"{service.get(job_id).created_at.ToDatetime():%Y-%m-%dT%H:%M:%SZ}"
    assert all("127.0.0.1" in fields[4] for fields in lines)
    assert lines[3][5] == "once more"


def test_the_error_is_the_reason_where_no_other_is_given(here, service, new_id):
    job_id = service.job_in("IN_PROGRESS").id
    here("update", job_id, "--state", "retrying", "--error", "out of memory")
    here("update", job_id, "--state", "failed", "--error", "disk full", "--reason", "gave up")
    failed = new_id()
    here("update", failed, "--allow-missing", "--state", "failed", "--error", "no disk")
    reasons = [line.split("\t")[5] for line in here("history", job_id).stdout.splitlines()[-2:]]
    assert reasons == ["out of memory", "gave up"]
    assert here("history", failed).stdout.endswith("\tno disk\n")


@pytest.mark.parametrize(("flags", "shown"), [([], ""), (["--reason", "wrong file"], ": wrong file")])
def test_a_cancel_request_is_named(here, service, flags, shown):
    job_id = service.job_in("IN_PROGRESS").id
    here("cancel", job_id, *flags)
    assert here("history", job_id).stdout.endswith(f"\tcancel requested{shown}\n")


def test_json_is_a_transition_as_protobuf_has_it(here, job_id):
    last = json.loads(here("history", job_id, "--json").stdout.splitlines()[-1])
    del last["transitionedAt"], last["actor"], last["reason"]
    assert last == {
        "fromState": "JOB_STATE_IN_PROGRESS", "toState": "JOB_STATE_SUCCEEDED", "attempt": 2, "revision": "5"
    }  # fmt: skip


def test_a_limit_leaves_the_newest(here, job_id):
    every = here("history", job_id).stdout.splitlines()
    assert here("history", job_id, "--limit", "2").stdout.splitlines() == every[-2:]


def test_a_table_is_drawn_on_a_terminal(terminal, job_id):
    header, *rows = terminal("history", job_id).read_to_end().splitlines()
    assert header.split() == ["when", "from", "→", "to", "attempt", "actor", "reason"]
    assert "pending → in_progress" in rows[1]
    assert len(rows) == 5
