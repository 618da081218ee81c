"""`jobstatus watch` of several jobs, and of all that a filter matches."""

from __future__ import annotations

import json
import signal

import pytest

from tests.support.servers import ServerProcess


@pytest.fixture
def label(new_id):
    """A label that only the jobs of one test have."""
    return {"test": f"watch-{new_id()}"}


@pytest.fixture
def flags(label):
    return ["--label", f"test={label['test']}"]


def next_event(watch):
    event = json.loads(watch.stdout.readline())
    return event["event"], event.get("id") or event.get("job", {}).get("id")


def test_jobs_are_shown_as_they_come_and_change_and_go(start, service, flags, label):
    first = service.create(labels=label).id
    watch = start("watch", *flags, "--not-done", "--json")
    assert [next_event(watch), next_event(watch)] == [("snapshot", first), ("synced", None)]
    second = service.create(labels=label).id
    assert next_event(watch) == ("updated", second)
    service.update(first, state="JOB_STATE_IN_PROGRESS", attempt=1)
    assert next_event(watch) == ("updated", first)
    service.update(first, state="JOB_STATE_FAILED")
    event = json.loads(watch.stdout.readline())
    assert (event["event"], event["id"], event["revision"]) == ("removed", first, "3")
    assert event["job"]["state"] == "JOB_STATE_FAILED"


def test_a_deleted_job_is_removed_without_what_it_was(start, here, service, flags, label):
    job = service.job_in("SUCCEEDED", labels=label)
    watch = start("watch", *flags, "--follow", "--json")
    assert [next_event(watch)[0], next_event(watch)[0]] == ["snapshot", "synced"]
    here("delete", job.id)
    assert json.loads(watch.stdout.readline()) == {
        "event": "removed", "id": job.id, "revision": str(job.revision + 1)
    }  # fmt: skip


def test_a_line_is_printed_for_each_change_where_it_is_piped(start, here, service, flags, label):
    job_id = service.create(name="backup", labels=label).id
    watch = start("watch", *flags, "--follow")
    assert watch.stdout.readline().split()[1:] == [job_id, "backup", "pending"]
    service.update(job_id, state="JOB_STATE_SUCCEEDED")
    assert watch.stdout.readline().split()[1:] == [job_id, "backup", "succeeded"]
    here("delete", job_id)
    assert watch.stdout.readline().endswith(f"{job_id}  backup  succeeded  removed: deleted or expired\n")


def test_a_line_says_that_a_job_matches_no_longer(start, service, flags, label):
    job_id = service.create(labels=label).id
    watch = start("watch", *flags, "--state", "pending")
    watch.stdout.readline()
    service.update(job_id, state="JOB_STATE_SUCCEEDED")
    assert watch.stdout.readline().endswith("succeeded  removed: matches no longer\n")


def test_a_watch_by_filter_goes_on_until_it_is_interrupted(start, service, flags, label):
    service.job_in("FAILED", labels=label)
    watch = start("watch", *flags, "--follow")
    watch.stdout.readline()
    service.create(labels=label)
    watch.stdout.readline()
    assert watch.poll() is None
    watch.send_signal(signal.SIGINT)
    assert (*watch.communicate(), watch.returncode) == ("", "", 130)


@pytest.mark.parametrize(("state", "code"), [("SUCCEEDED", 0), ("CANCELLED", 3), ("FAILED", 1)])
def test_it_ends_once_no_match_is_open_where_that_is_asked_for(start, service, flags, label, state, code):
    ids = [service.create(labels=label).id for _ in range(2)]
    watch = start("watch", *flags, "--not-done", "--exit-when-done")
    watch.stdout.readline()
    for job_id in ids:
        service.update(job_id, state=f"JOB_STATE_{state}")
    assert (watch.wait(), watch.stderr.read()) == (code, "")


def test_a_watch_without_a_match_says_how_to_wait_for_the_first(here, flags):
    done = here("watch", *flags)
    assert (done.stdout, done.stderr) == ("", "no job matches; --follow waits for the first\n")
    assert done.returncode == 0


def test_a_watch_by_filter_ends_once_all_are_done(here, service, flags, label):
    service.job_in("SUCCEEDED", labels=label)
    done = here("watch", *flags)
    assert (done.stdout.count("\n"), done.stderr, done.returncode) == (1, "", 0)


def test_it_ends_at_once_where_nothing_matches(here, flags):
    done = here("watch", *flags, "--exit-when-done")
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_jobs_that_are_named_are_followed_until_all_are_done(start, service):
    first, second = (service.job_in("IN_PROGRESS").id for _ in range(2))
    watch = start("watch", first, second, "--json")
    assert {json.loads(watch.stdout.readline())["id"] for _ in range(2)} == {first, second}
    service.update(second, state="JOB_STATE_CANCELLED")
    assert json.loads(watch.stdout.readline())["state"] == "JOB_STATE_CANCELLED"
    service.update(first, state="JOB_STATE_SUCCEEDED")
    assert (json.loads(watch.stdout.readline())["id"], watch.stdout.read(), watch.wait()) == (first, "", 3)


def test_a_done_job_that_is_deleted_during_the_watch_does_not_end_the_watch_of_others(start, here, service):
    done, running = service.job_in("FAILED").id, service.job_in("IN_PROGRESS").id
    wait = start("watch", done, running)
    assert [wait.stdout.readline() != "" for _ in range(2)] == [True, True]
    here("delete", done)
    service.update(running, state="JOB_STATE_SUCCEEDED")
    assert (wait.wait(), wait.stderr.read()) == (1, "")


def test_more_jobs_are_waited_for_than_a_filter_takes(here, service, update_of, new_id):
    ids = [new_id() for _ in range(1100)]
    for part in (ids[:500], ids[500:1000], ids[1000:]):
        service.batch(*(update_of(job_id, allow_missing=True, state="JOB_STATE_SUCCEEDED") for job_id in part))
    done = here("wait", *ids)
    assert (done.returncode, done.stdout.count("\n")) == (0, 1100)


def test_a_watch_by_filter_goes_on_across_a_restart_of_the_server(start, cli_of, tmp_path):
    with ServerProcess(store=f"sqlite:///{tmp_path}/jobs.db") as server:
        cli = cli_of(server.address)
        job_id = cli("create", "--in-progress", "--name", "backup", "--quiet").stdout.strip()
        watch = start("watch", "--name", "backup", "--exit-when-done", "--json", by=cli)
        # Cut before it is synced, it would begin anew.
        assert [next_event(watch) for _ in range(2)] == [("snapshot", job_id), ("synced", None)]
        server.kill()
        server.start()
        cli("update", job_id, "--state", "succeeded")
        events = [json.loads(line)["event"] for line in watch.stdout]
        assert set(events) <= {"synced", "updated"}
        assert events.count("updated") == 1
        assert watch.wait() == 0


def test_filters_that_are_variables_do_not_hinder_the_watch_of_a_job(here, service):
    job_id = service.job_in("SUCCEEDED").id
    assert here("watch", job_id, env={"JOBSTATUS_NAME": "another"}).returncode == 0


def test_a_table_lives_on_a_terminal(terminal, here, service, flags, label):
    screen = terminal("watch", *flags, "--follow")
    screen.read_until("no job matches")
    job_id = service.create(name="backup", labels=label).id
    screen.read_until("backup")
    service.update(job_id, state="JOB_STATE_IN_PROGRESS", attempt=1, progress=42, reason="[b]x[/b]")
    assert "in_progress" in screen.read_until("42%")
    service.update(job_id, state="JOB_STATE_FAILED", error={"message": "disk full"})
    screen.read_until("disk full")
    here("delete", job_id)
    screen.read_until("no job matches")


def test_a_table_is_no_higher_than_the_terminal_and_shows_open_jobs_first(terminal, service, flags, label):
    service.job_in("IN_PROGRESS", name="running", labels=label)
    for number in range(30):
        service.job_in("SUCCEEDED", name=f"done {number}", labels=label)
    screen = terminal("watch", *flags, "--follow")
    shown = screen.read_until("… and 9 more")
    last = shown[shown.rindex("running") :].splitlines()
    assert len(last) == 23
    assert last[1].startswith("done 29")


@pytest.mark.parametrize("names", [["backup", "backup"], ["import of customers 1", "import of customers 2"]])
def test_jobs_with_like_names_are_shown_with_their_ids(terminal, service, flags, label, names):
    older, newer = (service.create(name=name, labels=label).id[-4:] for name in names)
    screen = terminal("watch", *flags, "--follow")
    assert f"{newer} " in screen.read_until(f"{older} ")


def test_ctrl_c_ends_the_table_without_a_word(terminal, service, flags, label):
    service.create(name="backup", labels=label)
    screen = terminal("watch", *flags, "--follow")
    screen.read_until("pending")
    screen.type("\x03")
    assert "Traceback" not in screen.read_to_end()
    assert screen.process.wait() == 130


def test_all_jobs_that_were_named_are_on_the_last_table(terminal, service, label):
    ids = [service.job_in("SUCCEEDED", name=f"job {number}").id for number in range(30)]
    screen = terminal("watch", *ids)
    rows = screen.read_to_end().splitlines()[-30:]
    assert [row.split()[1] for row in rows] == [str(number) for number in range(30)]
    assert screen.process.wait() == 0
