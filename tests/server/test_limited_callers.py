"""Callers that are limited to some jobs, on a server with real tokens: nothing shows that another job exists."""

from __future__ import annotations

import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.auth import Role
from tests.support.auth import AuthText, Callers, as_unknown
from tests.support.service import update_of
from tests.support.watch_jobs import REMOVED, RESET, SNAPSHOT, SYNCED, UPDATED, events_of

CORE = {"team": "core"}
ONLY = {"core": 'only = { labels = { team = "core" } }', "web": 'only = { labels = { team = "web" } }',
        "etl": 'only = { name_prefix = "etl-" }'}  # fmt: skip
NEVER = "no-such-job"


@pytest.fixture(scope="module", params=["native", "grpcio"])
def callers(request, serve_module, tmp_path_factory):
    """`core`, `web` and `etl`, each limited to its jobs, and `root`, which is not."""
    folder = tmp_path_factory.mktemp("auth")
    auth = AuthText(folder / "auth.toml")
    for name, only in ONLY.items():
        auth.admit(name, Role.OPERATOR, more=only)
    auth.admit("root", Role.OPERATOR)
    flags = ("--auth", str(auth.path), "--transport", request.param)
    callers = Callers(serve_module(*flags, store=f"sqlite:///{folder}/jobs.db"), auth)
    yield callers
    callers.close()


@pytest.fixture
def core(callers):
    return callers["core"]


@pytest.fixture
def root(callers):
    return callers["root"]


def list_jobs(service, **fields):
    return service.stub.ListJobs(pb.ListJobsRequest(**fields))


def ids_of(service, **fields):
    return [job.id for job in list_jobs(service, filter=pb.JobFilter(**fields)).jobs]


def history(service, job_id, **fields):
    return service.stub.ListJobTransitions(pb.ListJobTransitionsRequest(id=job_id, **fields))


def watch_jobs(service, **fields):
    return service.stub.WatchJobs(pb.WatchJobsRequest(**fields), timeout=20)


def events_until(stream, event_type):
    """The events up to the first of this type."""
    events = []
    for message in stream:
        events += message.events
        if event_type in [event.type for event in message.events]:
            return events
    raise AssertionError("the stream ended")


CALLS = {
    "get": lambda service, job_id: service.get(job_id),
    "history": history,
    "history by a token": lambda service, job_id: history(service, job_id, page_token="x"),
    "watch": lambda service, job_id: next(service.watch(job_id)),
    "update": lambda service, job_id: service.update(job_id, progress=1),
    "heartbeat": lambda service, job_id: service.update(job_id),
    "claim": lambda service, job_id: service.update(job_id, state="JOB_STATE_IN_PROGRESS", attempt=1),
    "move in": lambda service, job_id: service.update(job_id, labels=CORE),
    "another revision": lambda service, job_id: service.update(job_id, expected_revision=99),
    "a known request": lambda service, job_id: service.update(job_id, progress=1, request_id="known"),
    "cancel": lambda service, job_id: service.cancel(job_id),
    "delete": lambda service, job_id: service.stub.DeleteJob(pb.DeleteJobRequest(id=job_id)),
}


def unlabelled(root, job_id):
    root.create(id=job_id)


def of_another_team(root, job_id):
    root.job_in("SUCCEEDED", id=job_id, labels={"team": "web"}, name="report")


def with_the_request(root, job_id):
    root.create(id=job_id)
    root.update(job_id, progress=1, request_id="known")


def removed(root, job_id):
    root.job_in("SUCCEEDED", id=job_id, labels=CORE)
    root.stub.DeleteJob(pb.DeleteJobRequest(id=job_id))


UNSEEN = [unlabelled, of_another_team, with_the_request, removed]


@pytest.mark.parametrize("make", UNSEEN)
@pytest.mark.parametrize("call", CALLS)
def test_a_call_for_an_unseen_job_ends_as_for_one_that_never_was(core, root, refused, new_id, make, call):
    job_id = new_id()
    make(root, job_id)
    before = root.get(job_id) if make is not removed else None
    refusal = refused(CALLS[call], core, job_id)
    assert as_unknown(refusal, job_id) == as_unknown(refused(CALLS[call], core, NEVER), NEVER)
    assert refusal.kind == (
        ("INVALID_ARGUMENT", "INVALID_TOKEN") if "token" in call else ("NOT_FOUND", "JOB_NOT_FOUND")
    )
    assert before is None or root.get(job_id) == before


def test_a_page_of_the_history_of_an_unseen_job_is_not_found_whatever_its_token(core, root, refused, new_id):
    job = root.job_in("SUCCEEDED", id=new_id(), labels=CORE)
    token = history(core, job.id, page_size=1).next_page_token
    assert len(history(core, job.id, page_token=token).transitions) == 2
    other = root.job_in("IN_PROGRESS", id=new_id(), labels=CORE)
    token = history(core, other.id, page_size=1).next_page_token
    root.update(other.id, mask=["labels"])
    assert refused(history, core, other.id, page_token=token).kind == ("NOT_FOUND", "JOB_NOT_FOUND")


def test_an_item_of_a_batch_is_refused_by_itself(core, root, new_id):
    ours, theirs = root.create(id=new_id(), labels=CORE), root.create(id=new_id())
    results = core.batch(*(update_of(job_id, reason="x") for job_id in (theirs.id, ours.id, NEVER)))
    assert [result.error.reason for result in results] == ["JOB_NOT_FOUND", "", "JOB_NOT_FOUND"]
    assert results[0].error.message.replace(theirs.id, NEVER) == results[2].error.message
    assert (root.get(theirs.id), root.get(ours.id).reason) == (theirs, "x")


@pytest.mark.parametrize("make", UNSEEN)
def test_an_id_that_is_taken_is_the_only_thing_that_shows(core, root, refused, new_id, make):
    job_id = new_id()
    make(root, job_id)
    creations = [
        refused(core.create, id=job_id, labels=CORE),
        refused(core.create, id=job_id, labels=CORE, request_id="known"),
        refused(core.update, job_id, labels=CORE, allow_missing=True),
        refused(core.update, job_id, labels=CORE, allow_missing=True, request_id="known"),
    ]
    assert {refusal.kind for refusal in creations} == {("ALREADY_EXISTS", "JOB_ALREADY_EXISTS")}
    assert {refusal.message for refusal in creations} == {f"job '{job_id}' exists, or did within the last 24 hours"}


@pytest.mark.parametrize("by_update", [False, True])
def test_a_creation_must_carry_the_limits_and_the_error_names_what_is_missing(core, root, refused, new_id, by_update):
    job_id = new_id()
    call = core.update if by_update else lambda job_id, allow_missing, **fields: core.create(id=job_id, **fields)
    refusal = refused(call, job_id, allow_missing=True, labels={"team": "web"})
    assert refusal.kind == ("PERMISSION_DENIED", "NOT_ALLOWED")
    assert "needs the label team=core" in refusal.message
    assert refused(root.get, job_id).reason == "JOB_NOT_FOUND"
    assert call(job_id, allow_missing=True, labels=CORE).labels == CORE


def test_a_name_may_be_the_limit(callers, refused, new_id):
    etl = callers["etl"]
    assert "a name that begins with 'etl-'" in refused(etl.create, id=new_id(), name="load").message
    job = etl.create(id=new_id(), name="etl-load")
    assert etl.update(job.id, labels={"a": "b"}).labels == {"a": "b"}
    assert set(ids_of(etl)) == {job.id}


def test_an_update_cannot_move_a_job_out(core, refused, new_id):
    job = core.create(id=new_id(), labels=CORE)
    for call in ({"labels": {"team": "web"}}, {"mask": ["labels"]}):
        assert refused(core.update, job.id, **call).kind == ("PERMISSION_DENIED", "NOT_ALLOWED")
    (result,) = core.batch(update_of(job.id, labels={"team": "web"}))
    assert (result.error.code, result.error.reason) == (7, "NOT_ALLOWED")
    assert core.get(job.id) == job


def test_two_teams_may_use_one_request_id_and_a_retry_finds_its_own_job(callers, new_id):
    request_id = new_id()
    ours, again = (callers["core"].create(labels=CORE, request_id=request_id) for _ in range(2))
    theirs = callers["web"].create(labels={"team": "web"}, request_id=request_id)
    assert ours == again
    assert len({ours.id, theirs.id, callers["root"].create(labels=CORE, request_id=request_id).id}) == 3


def test_a_job_that_comes_to_match_is_seen_whole_with_the_history_from_before(core, root, new_id):
    job = root.create(id=new_id(), reason="ours alone")
    root.update(job.id, labels=CORE)
    assert [entry.reason for entry in history(core, job.id).transitions] == ["ours alone"]


def test_a_list_has_no_other_jobs_whatever_its_filter(core, root, new_id):
    parent = root.create(id=new_id(), name="n")
    ours = root.create(id=new_id(), labels=CORE, parent_id=parent.id, name="n")
    theirs = root.create(id=new_id(), labels={"team": "web"}, parent_id=parent.id, name="n")
    assert ids_of(core, ids=[ours.id, theirs.id, parent.id]) == [ours.id]
    assert ids_of(core, parent_id=parent.id) == [ours.id]
    assert ids_of(core, labels={"team": "web"}) == ids_of(core, ids=[theirs.id], labels={"team": "web"}) == []
    assert not {theirs.id, parent.id} & set(ids_of(core, names=["n"]))


def test_the_numbers_of_a_parent_count_all_children_and_nothing_else_of_one_that_is_unseen_shows(core, root, new_id):
    ours, theirs = root.create(id=new_id(), labels=CORE), root.create(id=new_id())
    root.create(id=new_id(), parent_id=ours.id, labels={"team": "web"})
    for parent_id in (theirs.id, new_id()):
        child = core.create(id=new_id(), parent_id=parent_id, labels=CORE)
        assert (child.parent_id, dict(child.children)) == (parent_id, {})
    assert dict(core.get(ours.id).children) == {"pending": 1}
    after = root.get(theirs.id)
    assert dict(after.children) == {"pending": 1}
    assert (after.revision, after.updated_at) == (theirs.revision, theirs.updated_at)


def test_a_token_is_for_the_jobs_that_its_caller_sees(callers, core, root, refused, new_id):
    for _ in range(2):
        root.create(id=new_id(), labels=CORE)
    tokens = {name: list_jobs(callers[name], page_size=1) for name in ("core", "root")}
    assert list_jobs(core, page_size=1, page_token=tokens["core"].next_page_token).jobs
    for name, other in (("core", root), ("root", core)):
        token = tokens[name].next_page_token
        assert refused(list_jobs, other, page_token=token).reason == "INVALID_TOKEN"
        resumed = watch_jobs(other, resume_token=tokens[name].resume_token)
        assert refused(next, resumed).reason == "INVALID_TOKEN"


def test_a_watch_of_a_job_ends_when_it_leaves(core, root, refused, new_id):
    job = root.job_in("IN_PROGRESS", id=new_id(), labels=CORE)
    stream = core.watch(job.id)
    assert next(stream).event.job == job
    root.update(job.id, labels={"team": "web"}, result={"secret": 1})
    refusal = refused(next, stream)
    assert as_unknown(refusal, job.id) == as_unknown(refused(core.get, NEVER), NEVER)


def test_a_watch_of_all_jobs_has_only_its_own_and_of_one_that_leaves_the_id(core, root, new_id):
    ours, theirs = root.job_in("IN_PROGRESS", id=new_id(), labels=CORE), root.create(id=new_id())
    stream = watch_jobs(core)
    seen = {event.job.id for event in events_until(stream, SYNCED)}
    assert (ours.id in seen, theirs.id in seen) == (True, False)
    root.update(theirs.id, reason="x")
    moved = root.update(ours.id, labels={"team": "web"}, result={"secret": 1})
    root.update(theirs.id, labels=CORE)
    removal, arrival = events_until(stream, UPDATED)
    assert removal == pb.JobEvent(type=REMOVED, job=pb.JobStatus(id=ours.id, revision=moved.revision))
    assert (arrival.job.id, dict(arrival.job.labels)) == (theirs.id, CORE)
    stream.cancel()


def test_a_watch_with_a_filter_that_excludes_all_of_them_is_empty(core, root, new_id):
    stream = watch_jobs(core, filter=pb.JobFilter(labels={"team": "web"}), heartbeat_interval={"seconds": 1})
    assert events_of(next(stream)) == [(SYNCED, "")]
    root.create(id=new_id(), labels={"team": "web"})
    assert events_of(next(stream)) == [(pb.JOB_EVENT_TYPE_HEARTBEAT, "")]
    stream.cancel()


def test_a_watch_starts_over_since_a_resume_would_name_jobs_that_were_never_seen(core, root, new_id):
    ours, theirs = root.create(id=new_id(), labels=CORE), root.create(id=new_id())
    token = list_jobs(core).resume_token
    root.update(theirs.id, reason="x")
    stream = watch_jobs(core, resume_token=token)
    events = events_until(stream, SYNCED)
    assert [event.type for event in events if event.type != SNAPSHOT] == [RESET, SYNCED]
    ids = [event.job.id for event in events]
    assert (ours.id in ids, theirs.id in ids) == (True, False)
    stream.cancel()


def test_whoami_names_the_limits(core):
    identity = core.stub.GetCallerIdentity(pb.GetCallerIdentityRequest()).identity
    assert (identity.principal, identity.only, identity.authenticated) == ("core", pb.JobFilter(labels=CORE), True)


def test_a_job_that_leaves_while_it_is_updated_gets_no_update_after(core, root, new_id):
    job = root.create(id=new_id(), labels=CORE)
    calls = [core.stub.UpdateJob.future(update_of(job.id, reason=f"{n}")) for n in range(50)]
    moved = root.update(job.id, mask=["labels"])
    late = [core.stub.UpdateJob.future(update_of(job.id, reason="late")) for _ in range(50)]
    assert all(call.exception() is not None for call in late)
    done = [call.result().job for call in calls if call.exception() is None]
    assert all(updated.revision < moved.revision for updated in done)
    assert root.get(job.id) == moved
