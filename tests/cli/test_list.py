"""`jobstatus list`: every filter, in every form, and the limit."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def label(new_id):
    """A label that only the jobs of one test have."""
    return "test", f"list-{new_id()}"


@pytest.fixture
def listed(here, label):
    """List the jobs of this test: the ids."""
    return lambda *flags: [line.split("\t")[0] for line in here("list", *_with(label), *flags).stdout.splitlines()]


def _with(label: tuple[str, str]) -> list[str]:
    return ["--label", "=".join(label)]


def some_jobs(service, label, count: int, **fields) -> list[str]:
    """Create jobs, and return their ids, the newest first."""
    return [service.create(labels=dict([label]), **fields).id for _ in range(count)][::-1]


def test_jobs_are_listed_the_newest_first(listed, service, label):
    ids = some_jobs(service, label, 3)
    assert listed() == ids


def test_a_line_has_each_field_if_only_empty(here, service, label):
    job = service.job_in("FAILED", name="back\u2028up", labels=dict([label]))
    service.create(labels=dict([label]))
    nameless, failed = (line.split("\t") for line in here("list", *_with(label)).stdout.splitlines())
    created_at = f"{job.created_at.ToDatetime():%Y-%m-%dT%H:%M:%SZ}"
    assert failed == [job.id, "back up", "failed", "", created_at, ""]
    assert [*nameless[1:4], nameless[5]] == ["", "pending", "", ""]


def test_json_is_that_of_get(here, service, label):
    job_id = service.job_in("FAILED", labels=dict([label]), progress=42).id
    assert here("list", *_with(label), "--json").stdout == here("get", job_id, "--json").stdout


@pytest.mark.parametrize(
    ("flags", "wanted", "other"),
    [
        (["--state", "failed"], {"state": "FAILED"}, {"state": "SUCCEEDED"}),
        (["--state", "failed", "--state", "aborted"], {"state": "ABORTED"}, {"state": "SUCCEEDED"}),
        (["--name", "back up"], {"name": "back up"}, {"name": "back"}),
        (["--name", "x", "--name", "backup"], {"name": "backup"}, {"name": "back"}),
        (["--name-prefix", "back"], {"name": "backup"}, {"name": "a backup"}),
        (["--label", "a=b=c"], {"labels": {"a": "b=c"}}, {"labels": {"a": "b"}}),
        (["--parent", "p"], {"parent_id": "p"}, {"parent_id": "q"}),
        (["--done"], {"state": "CANCELLED"}, {"state": "RETRYING"}),
        (["--not-done"], {"state": "RETRYING"}, {"state": "CANCELLED"}),
    ],
)
def test_each_filter_selects(listed, service, label, flags, wanted, other):
    ids = []
    for fields in (other, wanted):
        labels = {**fields.get("labels", {}), label[0]: label[1]}
        ids.append(service.job_in(**{"state": "PENDING", **fields, "labels": labels}).id)
    assert listed(*flags) == ids[1:]


def test_ids_are_listed(listed, service, label):
    first, _, third = some_jobs(service, label, 3)
    assert listed("--id", first, "--id", third) == [first, third]


def test_stalled_jobs_are_listed(listed, service, label):
    in_progress = service.job_in("IN_PROGRESS", labels=dict([label])).id
    assert (listed("--stalled"), listed("--not-stalled")) == ([], [in_progress])


def test_jobs_are_listed_by_when_they_were_created(listed, service, label):
    service.create(labels=dict([label]))
    job = service.create(labels=dict([label]))
    assert listed("--created-after", job.created_at.ToJsonString()) == [job.id]
    assert len(listed("--created-before", job.created_at.ToJsonString())) == 1


def test_a_duration_is_that_long_ago(listed, service, label):
    ids = some_jobs(service, label, 1)
    assert (listed("--created-after", "1h"), listed("--created-before", "1h")) == (ids, [])
    assert (listed("--created-after", "0s"), listed("--created-before", "0s")) == ([], ids)


def test_a_limit_that_is_asked_for_is_no_surprise(here, service, label):
    ids = some_jobs(service, label, 3)
    done = here("list", *_with(label), "--limit", "2")
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == ids[:2]
    assert (done.stderr, done.returncode) == ("", 0)


def test_as_many_as_the_limit_are_all(here, service, label):
    some_jobs(service, label, 2)
    assert here("list", *_with(label), "--limit", "2").stderr == ""


def test_50_are_listed_unless_more_are_asked_for(here, listed, service, label):
    ids = some_jobs(service, label, 51)
    assert (listed(), listed("--all"), listed("--limit", "51")) == (ids[:50], ids, ids)
    assert here("list", *_with(label)).stderr == "only the newest 50: --limit N or --all shows more\n"


def test_all_are_listed_page_after_page(listed, service, label, update_of, new_id):
    for _ in range(5):
        updates = [update_of(new_id(), allow_missing=True, labels=dict([label])) for _ in range(500)]
        service.batch(*updates)
    ids = listed("--all")
    assert (len(ids), len(set(ids))) == (2500, 2500)
    assert listed("--limit", "1500") == ids[:1500]


def test_no_job_is_no_line(here, label):
    done = here("list", *_with(label))
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_a_closed_pipe_ends_a_list_quietly(start):
    listing = start("list", "--all")
    listing.stdout.close()
    assert (listing.stderr.read(), listing.wait()) == ("", 141)


def test_filters_may_be_variables(here, service, label):
    ids = some_jobs(service, label, 1)
    done = here("list", "--json", env={"JOBSTATUS_LABEL": "=".join(label), "JOBSTATUS_DONE": "false"})
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == ids


def test_the_id_of_a_job_to_create_is_no_filter(here, service, label):
    job_id = service.create(labels=dict([label])).id
    done = here("list", "--label", "=".join(label), env={"JOBSTATUS_ID": "another"})
    assert done.stdout.split("\t")[0] == job_id


def test_a_variable_holds_one_name_or_label_a_line(here, service, new_id):
    name, key = f"nightly backup {new_id()}", new_id()
    job = service.create(name=name, labels={key: "two words"})
    done = here("list", "--json", env={"JOBSTATUS_NAME": f"another\n{name}", "JOBSTATUS_LABEL": f"{key}=two words"})
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == [job.id]


def test_a_table_is_drawn_on_a_terminal(terminal, service, label):
    failed = service.job_in("FAILED", name="unpack", labels=dict([label]))
    long = service.create(name="a name that is much too long for its column", labels=dict([label]), reason="[b]why[/b]")
    screen = terminal("list", *_with(label))
    rows = [row.split() for row in screen.read_to_end().splitlines()]
    assert rows[0] == ["id", "name", "state", "%", "age", "reason"]
    assert rows[1][:3] == [long.id, "a", "name"]
    assert rows[1][-1] == "[b]why[/b]"
    assert rows[2][:3] == [failed.id, "unpack", "failed"]
    assert screen.process.wait() == 0


@pytest.mark.parametrize("columns", [80, 120])
def test_a_table_fits_the_terminal(terminal, service, label, columns):
    some_jobs(service, label, 2, name="n" * 100, reason="r" * 1000)
    screen = terminal("list", *_with(label), columns=columns)
    assert {len(row) for row in screen.read_to_end().splitlines()[1:]} == {columns}


def test_an_empty_list_is_a_sentence_on_a_terminal(terminal, label):
    assert terminal("list", *_with(label)).read_to_end() == "no job matches\r\n"
