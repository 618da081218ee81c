"""`jobstatus watch` in a terminal: live bars."""

from __future__ import annotations

import re

import pytest

from tests.support.servers import ServerProcess

CTRL_C = "\x03"


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


@pytest.mark.slow
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
