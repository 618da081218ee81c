"""`jobstatus tree`, `watch --tree`, `cancel --cascade`, and a `run` inside a `run`."""

from __future__ import annotations

import json
import re
import sys
from datetime import datetime, timezone

import pytest

from jobstatus_grpc.cli import output, trees
from jobstatus_grpc.job import Job, JobState

US = f'"{sys.executable}" -m jobstatus_grpc'


@pytest.fixture
def family(service, new_id):
    """A job with two children, one of which has a child."""
    root = service.job_in("IN_PROGRESS", id=new_id(), name="nightly").id
    one = service.job_in("IN_PROGRESS", id=new_id(), name="part 1", parent_id=root).id
    two = service.create(id=new_id(), name="part 2", parent_id=root).id
    deep = service.create(id=new_id(), name="deep", parent_id=one).id
    service.update(one, progress=50)
    return root, one, two, deep


def test_tree_draws_a_job_and_all_jobs_below_it(here, family):
    root, one, two, deep = family
    assert here("tree", root).stdout.splitlines() == [
        f"in_progress  children 25%  nightly  {root}",
        f"├─ in_progress  50%  part 1  {one}",
        f"│  └─ pending  deep  {deep}",
        f"└─ pending  part 2  {two}",
    ]


def test_tree_counts_the_jobs_beyond_its_limit(here, family):
    root, _, two, _ = family
    lines = here("tree", root, "--limit", "2").stdout.splitlines()
    assert lines[1:] == [f"├─ pending  part 2  {two}", "└─ … 1 more"]
    assert here("tree", root, "--limit", "3").stdout.splitlines()[2] == "│  └─ … 1 more"


def test_tree_prints_json(here, family):
    root, one, two, deep = family
    tree = json.loads(here("tree", root, "--json").stdout)
    assert (tree["job"]["id"], tree["leftOut"]) == (root, 0)
    assert [child["job"]["id"] for child in tree["children"]] == [one, two]
    assert tree["children"][0]["children"][0]["job"]["id"] == deep
    assert tree["job"]["children"] == {"in_progress": "1", "pending": "1"}


def test_tree_draws_a_circle_once(here, service, new_id):
    one, two = new_id(), new_id()
    service.create(id=one, parent_id=two)
    service.create(id=two, parent_id=one)
    assert here("tree", one).stdout.splitlines() == [f"pending  children 0%  {one}", f"└─ pending  children 0%  {two}"]


def job(job_id, parent_id="", **fields):
    now = datetime.now(timezone.utc)
    return Job(id=job_id, parent_id=parent_id, state=JobState.PENDING, created_at=now, updated_at=now, **fields)


def test_tree_prints_a_chain_of_any_depth_as_json_and_counts_the_jobs_beyond_100_levels():
    tree = trees.JobTree(job("0", children={"pending": 1}), limit=1000)
    for number in range(1, 1000):
        tree.put(job(str(number), str(number - 1), children={"pending": 1}))
    level = json.loads(output.in_json(tree.to_object()))
    for _ in range(99):
        assert level["leftOut"] == 0
        [level] = level["children"]
    assert (level["job"]["id"], level["children"], level["leftOut"]) == ("99", [], 1)
    assert len(tree.rows()) == 1001  # with "… 1 more"


def test_a_job_that_is_created_again_below_another_job_moves_and_can_be_removed():
    tree = trees.JobTree(job("root"))
    for each in job("a", "root"), job("b", "root"), job("x", "a"), job("x", "b"):
        tree.put(each)
    assert [row.job and row.job.id for row in tree.rows()] == ["root", "a", "b", "x"]
    assert tree.rows()[3].branches == "   └─ "
    tree.remove("x")
    assert [row.job and row.job.id for row in tree.rows()] == ["root", "a", "b"]


def test_tree_of_an_unknown_job_fails(here, new_id):
    assert here("tree", new_id()).returncode == 5


def test_watch_tree_follows_all_jobs_until_the_root_is_done(start, service, family, new_id):
    root, _, two, deep = family
    watch = start("watch", "--tree", root, "--json")
    seen: dict[str, dict] = {}

    def read_until(job_id, state):
        while seen.get(job_id, {}).get("state") != f"JOB_STATE_{state}":
            job = json.loads(watch.stdout.readline())
            seen[job["id"]] = job

    read_until(deep, "PENDING")
    read_until(two, "PENDING")
    service.cancel(deep)
    read_until(deep, "CANCELLED")
    late = service.create(id=new_id(), parent_id=two).id
    read_until(late, "PENDING")
    service.update(root, state="JOB_STATE_FAILED")
    read_until(root, "FAILED")
    assert (watch.wait(), watch.stdout.read(), watch.stderr.read()) == (1, "", "")


def test_watch_tree_draws_on_a_terminal(terminal, service, family):
    root, one, _, _ = family
    screen = terminal("watch", "--tree", root)
    screen.read_until("└─ pending  deep")
    service.update(one, progress=70)
    screen.read_until("in_progress  70%  part 1")
    service.update(root, state="JOB_STATE_SUCCEEDED")
    assert "succeeded  nightly" in screen.read_to_end()
    assert screen.process.wait() == 0


@pytest.fixture
def done_family(service, family):
    """The same jobs, all done."""
    for job_id in reversed(family):
        service.update(job_id, state="JOB_STATE_FAILED")
    return family


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_watch_tree_of_a_done_job_prints_all_jobs_below_it_and_then_the_job(here, done_family, as_json):
    root, one, two, deep = done_family
    done = here("watch", "--tree", root, *as_json)
    found = [re.findall("|".join(done_family), line)[0] for line in done.stdout.splitlines()]
    assert (found, done.stderr, done.returncode) == ([one, deep, two, root], "", 1)


def test_watch_tree_of_a_done_job_draws_it_as_tree_does(here, terminal, done_family):
    root = done_family[0]
    lines = here("tree", root).stdout.splitlines()
    drawn = terminal("watch", "--tree", root).read_to_end()
    assert drawn[drawn.rindex(lines[0]) :].splitlines() == lines


def test_watch_tree_needs_one_id(here):
    assert "--tree needs exactly one ID" in here("watch", "--tree").stderr


def test_cancel_cascades(here, service, family):
    assert here("cancel", family[0], "--cascade").returncode == 0
    assert [service.get(job_id).cancel_requested or service.get(job_id).done for job_id in family] == [True] * 4


def test_get_shows_the_children(here, family):
    assert "children   1 pending, 1 in_progress (25%)\n" in here("get", family[0]).stdout


def test_a_run_inside_a_run_is_its_child_unless_it_is_given_another_parent(cli, service):
    inner = f"{US} run --name inner -- true; {US} run --name free --parent '' -- true"
    done = cli("run", "--name", "outer", "--", "sh", "-c", inner)
    outer, *others = [line.split()[1] for line in done.stderr.splitlines() if line.startswith("job ")]
    assert [service.get(job_id).parent_id for job_id in others] == [outer, ""]


def test_what_a_program_tracks_that_is_run_is_a_child(cli, service):
    program = "from jobstatus_grpc import JobStatusClient as C\nwith C() as c, c.track('t') as t: print(t.id)"
    done = cli("run", "--", sys.executable, "-c", program)
    outer = done.stderr.split()[1]
    assert service.get(done.stdout.strip()).parent_id == outer
