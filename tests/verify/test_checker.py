"""Each rule of the checker on the smallest history that breaks it, and on a history that breaks none."""

from __future__ import annotations

import itertools
import time

import pytest
from google.protobuf import json_format
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.verify import checker, history
from jobstatus_grpc.verify.history import Entry

PENDING, RUNNING, SUCCEEDED, FAILED = (
    "JOB_STATE_PENDING",
    "JOB_STATE_IN_PROGRESS",
    "JOB_STATE_SUCCEEDED",
    "JOB_STATE_FAILED",
)


def job(revision, state=RUNNING, **fields):
    """A job in JSON, with what the service sets."""
    done = {"done": True, "finishedAt": "2026-01-01T00:00:00Z"} if state in (SUCCEEDED, FAILED) else {}
    times = {"createdAt": "2026-01-01T00:00:00Z", "updatedAt": f"2026-01-01T00:00:{revision:02}Z"}
    return {"id": "a", "state": state, "attempt": 1, "revision": str(revision), **times, **done, **fields}


class Recording:
    """Entries one after another, each a second long."""

    def __init__(self):
        self.entries = []
        self._numbers = itertools.count(1)

    def call(self, method, request, response=None, *, code="OK", at=None, seconds=1.0):
        number = next(self._numbers)
        at = float(number * 10) if at is None else at
        responses = [] if response is None else [{"at": at + seconds, "message": response}]
        return self._add(number, method, request, responses, code, at, at + seconds)

    def stream(self, method, request, *messages, code="", seconds=5.0):
        number = next(self._numbers)
        at = float(number * 10)
        responses = [{"at": at + 0.1 * place, "message": message} for place, message in enumerate(messages)]
        return self._add(number, method, request, responses, code, at, at + seconds)

    def _add(self, number, method, request, responses, code, started_at, ended_at):
        values = {"number": number, "method": method, "request": request, "responses": responses, "code": code}
        self.entries.append(history.from_json({**values, "started_at": started_at, "ended_at": ended_at}))
        return self

    def create(self, **fields):
        return self.call("CreateJob", {"job": {"id": "a"}}, {"job": job(1, **fields)})

    def update(self, revision, state=RUNNING, *, request=None, **fields):
        return self.call(
            "UpdateJob", request or {"job": {"id": "a", **fields}}, {"job": job(revision, state, **fields)}
        )

    def get(self, revision, state=RUNNING, **fields):
        return self.call("GetJob", {"id": "a"}, {"job": job(revision, state, **fields)})

    def watch(self, *events, **ending):
        messages = [{"event": {"type": f"JOB_EVENT_TYPE_{kind}", "job": of_job}} for kind, of_job in events]
        return self.stream("WatchJob", {"id": "a"}, *messages, **ending)

    def watch_jobs(self, token, *messages, **ending):
        return self.stream("WatchJobs", {"resumeToken": token, "minUpdateInterval": "0s"}, *messages, **ending)


def family(*, numbers, at=None):
    """A parent `p` with these numbers, whose one child is IN_PROGRESS at 40 %."""
    child = {**job(1, parentId="p"), "progress": 40}
    parent = {**job(1, PENDING), "id": "p", "attempt": 0}
    recording = (
        Recording()
        .call("CreateJob", {"job": {"id": "p"}}, {"job": parent})
        .call("CreateJob", {"job": {"id": "a", "parentId": "p"}}, {"job": child})
    )
    listed = recording.call("ListJobs", {"filter": {"parentId": "p"}}, {"jobs": [child]})
    return listed.call("GetJob", {"id": "p"}, {"job": {**parent, **numbers}}, at=at)


def events(*pairs, token=""):
    listed = [{"type": f"JOB_EVENT_TYPE_{kind}", **({"job": of_job} if of_job else {})} for kind, of_job in pairs]
    return {"events": listed, "resumeToken": token}


def rules_broken_by(recording):
    return {violation.rule for violation in checker.check(recording.entries, patience_seconds=1)}


GOOD = (
    Recording()
    .create()
    .update(2, reason="one")
    .update(2, request={"job": {"id": "a"}}, reason="one")
    .watch(("SNAPSHOT", job(2, reason="one")), ("HEARTBEAT", job(2, reason="one")))
    .watch_jobs("", events(("SNAPSHOT", job(2, reason="one")), ("SYNCED", None), token="t"))
    .update(3, SUCCEEDED, reason="end")
    .get(3, SUCCEEDED, reason="end")
    .watch(("SNAPSHOT", job(3, SUCCEEDED, reason="end")), code="OK")
    .watch_jobs("t", events(("UPDATED", job(3, SUCCEEDED, reason="end")), ("SYNCED", None)))
    .call("ListJobs", {}, {"jobs": [job(3, SUCCEEDED, reason="end")]})
    .call("DeleteJob", {"id": "a"}, {})
    .call("GetJob", {"id": "a"}, code="NOT_FOUND")
)  # fmt: skip

BROKEN = {
    "acknowledged-writes-last": [
        Recording().create().update(2, reason="b").get(1),
        Recording().create().call("GetJob", {"id": "a"}, code="NOT_FOUND"),
        Recording().create().update(2, reason="b").watch(("SNAPSHOT", job(1)), ("UPDATED", job(2, reason="b"))),
    ],
    "deleted-jobs-stay-deleted": [
        Recording().create(state=SUCCEEDED).call("DeleteJob", {"id": "a"}, {}).get(1, SUCCEEDED),
    ],
    "unknown-jobs-are-not-found": [Recording().get(1, PENDING)],
    "a-revision-has-one-content": [Recording().create().get(1, reason="other")],
    "writes-are-applied": [
        Recording().create().update(2, request={"job": {"id": "a", "reason": "mine"}}),
        Recording().create().update(2, reason="b").update(
            2, request={"job": {"id": "a", "reason": "c"}}, reason="c"
        ),
    ],
    "a-request-id-has-one-effect": [
        Recording()
        .create()
        .update(2, request={"job": {"id": "a", "reason": "b"}, "requestId": "r"}, reason="b")
        .update(3, reason="c")
        .update(4, request={"job": {"id": "a", "reason": "b"}, "requestId": "r"}, reason="b"),
    ],
    "revisions-are-contiguous": [
        Recording().create().update(3, reason="b"),
        Recording().create().call("UpdateJob", {"job": {"id": "a"}, "updateMask": ""}, {"job": job(2)}),
    ],
    "a-revision-is-compared-and-set": [
        Recording().create().update(2, reason="b").update(
            3, request={"job": {"id": "a", "reason": "c"}, "expectedRevision": 1}, reason="c"
        ),
    ],
    "an-attempt-has-one-owner": [
        Recording().create().update(2, request={"job": {"id": "a", "reason": "b"}, "attempt": 2}, reason="b"),
    ],
    "a-request-to-cancel-is-kept": [
        Recording().create().update(2, reason="b", cancelRequested=True).update(3, reason="c"),
        Recording().create().call("CancelJob", {"id": "a"}, {"job": job(1)}),
    ],
    "a-done-job-never-changes": [
        Recording().create().update(2, SUCCEEDED, reason="end").update(3, SUCCEEDED, reason="late"),
    ],
    "values-are-valid": [
        Recording().create(progress=101),
        Recording().create(progress="NaN"),
        Recording().create(progress=50).update(2, progress=40),
        Recording().create(done=True),
    ],
    "watches-rise": [
        Recording().create().watch(("UPDATED", job(1))),
        Recording().create().update(2, reason="b").watch(("SNAPSHOT", job(2, reason="b")), ("UPDATED", job(1))),
        Recording().create().watch(("SNAPSHOT", job(1)), ("UPDATED", job(1))),
        Recording().create().watch(
            ("SNAPSHOT", job(1, children={"pending": "1"})), ("UPDATED", job(1, children={"pending": "1"}))
        ),
        Recording().create().watch(("SNAPSHOT", job(1)), ("HEARTBEAT", job(1, children={"pending": "1"}))),
    ],
    "children-are-counted": [
        family(numbers={}),
        family(numbers={"children": {"pending": "1"}}),
        family(numbers={"children": {"in_progress": "1"}, "childrenProgress": 20}),
    ],
    "watches-end-with-the-job": [
        Recording().create().watch(("SNAPSHOT", job(1)), code="OK"),
        Recording().create().watch(("SNAPSHOT", job(1)), code="NOT_FOUND"),
        Recording().create().update(2, SUCCEEDED, reason="e").watch(
            ("SNAPSHOT", job(2, SUCCEEDED, reason="e")), ("HEARTBEAT", job(2, SUCCEEDED, reason="e")), code="OK"
        ),
    ],
    "watches-get-the-newest": [
        Recording().create().watch(),
        Recording().create().update(2, SUCCEEDED, reason="e").watch(("SNAPSHOT", job(2, SUCCEEDED, reason="e"))),
    ],
    "lists-are-complete": [
        Recording().create().call("ListJobs", {}, {"jobs": []}),
        Recording().create().call("ListJobs", {}, {"jobs": [job(1), job(1)]}),
        Recording().create().call("ListJobs", {"filter": {"done": True}}, {"jobs": [job(1)]}),
        Recording().create().call("ListJobs", {}, {"jobs": [job(1)], "nextPageToken": "p"}).call(
            "ListJobs", {"pageToken": "p"}, {"jobs": [job(1)]}
        ),
    ],
    "histories-are-chains": [
        Recording().create().call(
            "ListJobTransitions",
            {"id": "a"},
            {"transitions": [{"toState": RUNNING, "revision": 1}, {"fromState": PENDING, "revision": 2}]},
        ),
        Recording().create().update(2, reason="b", attempt=2).update(3, SUCCEEDED, reason="e", attempt=2).call(
            "ListJobTransitions",
            {"id": "a"},
            {"transitions": [{"toState": RUNNING, "revision": 1}, {"fromState": RUNNING, "revision": 3}]},
        ),
    ],
    "watches-of-many-jobs-are-complete": [
        Recording().create().update(2, reason="b").watch_jobs(
            "", events(("SNAPSHOT", job(1)), ("SYNCED", None)), code="UNAVAILABLE"
        ),
        Recording().create().watch_jobs("", events(("SYNCED", None))),
        Recording().create().watch_jobs("", events(("SNAPSHOT", job(1)))),
        Recording().create().watch_jobs("", events(("SNAPSHOT", job(1)), ("SYNCED", None), token="t")).update(
            2, reason="b"
        ).watch_jobs("t", events(("SYNCED", None))),
        Recording().create().watch_jobs(
            "", events(("SNAPSHOT", job(1)), ("SYNCED", None)), events(("REMOVED", {"id": "a", "revision": 2}))
        ),
    ],
}  # fmt: skip


def test_a_good_history_breaks_no_rule():
    assert rules_broken_by(GOOD) == set()


def test_every_rule_is_tested():
    assert set(BROKEN) == {rule.__name__.replace("_", "-") for rule in checker.RULES}


@pytest.mark.parametrize(("rule", "number"), [(rule, n) for rule, cases in BROKEN.items() for n in range(len(cases))])
def test_a_broken_rule_is_found(rule, number):
    assert rule in rules_broken_by(BROKEN[rule][number])


@pytest.mark.parametrize("rule", BROKEN)
def test_the_entries_of_a_violation_show_it_again(rule, tmp_path):
    noise = Recording().call("GetJob", {"id": "other"}, code="NOT_FOUND", at=1.0).entries
    found = [one for one in checker.check(BROKEN[rule][0].entries + noise, patience_seconds=1) if one.rule == rule]
    history.write(found[0].entries, tmp_path / "history.jsonl")
    again = checker.check(history.read(tmp_path / "history.jsonl"), patience_seconds=1)
    assert rule in {violation.rule for violation in again}
    assert not set(noise) & set(found[0].entries)


def test_lists_that_are_read_at_once_and_have_the_same_tokens_are_both_judged():
    recording = Recording().create()
    for _ in range(2):
        recording.call("ListJobs", {}, {"nextPageToken": "p"})
    recording.call("ListJobs", {"pageToken": "p"}, {"jobs": [job(1)]}).call("ListJobs", {"pageToken": "p"}, {})
    assert rules_broken_by(recording) == {"lists-are-complete"}


def test_children_that_may_have_changed_since_they_were_listed_are_not_counted():
    right = {"children": {"in_progress": "1"}, "childrenProgress": 40}
    assert checker.check(family(numbers=right).entries, patience_seconds=1) == []
    unsure = family(numbers={}, at=100.0).call("UpdateJob", {"job": {"id": "a"}}, code="UNAVAILABLE", at=50.0)
    assert checker.check(unsure.entries, patience_seconds=1) == []


def test_other_numbers_of_children_are_sent_with_the_same_revision():
    recording = Recording().create()
    recording.watch(("SNAPSHOT", job(1)), ("UPDATED", job(1, children={"pending": "1"})), code="UNAVAILABLE")
    assert checker.check(recording.entries, patience_seconds=1) == []


def test_a_write_without_an_answer_may_have_had_an_effect():
    unanswered = Recording().create().call("UpdateJob", {"job": {"id": "a", "reason": "b"}}, code="UNAVAILABLE")
    assert rules_broken_by(unanswered.update(3, reason="c")) == set()


def test_a_refused_write_has_no_effect():
    refused = Recording().create().call("UpdateJob", {"job": {"id": "a", "reason": "b"}}, code="ABORTED")
    assert rules_broken_by(refused.update(3, reason="c")) == {"revisions-are-contiguous"}


def test_a_clock_that_is_set_back_corrects_an_end_and_nothing_else():
    ended = Recording().create().update(2, SUCCEEDED, reason="e", finishedAt="2026-01-01T09:00:00Z")
    assert rules_broken_by(ended.get(3, SUCCEEDED, reason="e")) == set()
    assert "a-done-job-never-changes" in rules_broken_by(ended.get(4, FAILED, reason="e"))


def test_a_watch_that_the_network_ended_owes_nothing():
    assert rules_broken_by(Recording().create().watch(code="UNAVAILABLE")) == set()


def test_a_client_that_leaves_at_once_after_the_final_state_has_not_waited_for_the_end():
    end = job(2, SUCCEEDED, reason="e")
    recording = Recording().create().update(2, SUCCEEDED, reason="e").watch(("SNAPSHOT", end))
    watch = recording.entries[-1]
    watch.responses[-1] = (watch.ended_at - 0.5, watch.responses[-1][1])
    assert rules_broken_by(recording) == set()


def test_reset_begins_the_view_again():
    first = Recording().create().watch_jobs("", events(("SNAPSHOT", job(1)), ("SYNCED", None), token="t"))
    again = [events(("RESET", None)), events(("SNAPSHOT", job(2, reason="b")), ("SYNCED", None))]
    assert rules_broken_by(first.update(2, reason="b").watch_jobs("t", *again)) == set()


def test_a_history_survives_its_file(tmp_path):
    history.write(GOOD.entries, tmp_path / "history.jsonl")
    assert [*map(history.to_json, history.read(tmp_path / "history.jsonl"))] == [*map(history.to_json, GOOD.entries)]


def test_fields_of_a_newer_version_are_ignored():
    values = {"number": 1, "method": "GetJob", "request": {"id": "a", "newField": 1}, "started_at": 1.0}
    entry = history.from_json(values)
    assert isinstance(entry, Entry)
    assert json_format.MessageToDict(entry.request) == {"id": "a"}


@pytest.mark.parametrize(
    "line", ["{}", "[]", "no json", '{"number": 1, "method": "NoCall", "request": {}, "started_at": 1}']
)
def test_a_line_that_is_no_entry_is_named(line, tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text(f"\n{line}\n")
    with pytest.raises(ValueError, match="line 2: not an entry"):
        history.read(path)


def a_history_of(jobs):
    """Entries as of the random load: each job is created, updated, read, listed, watched. One has a child."""
    recording = Recording()
    parent = job(1) | {"id": "parent"}
    recording.call("CreateJob", {"job": {"id": "parent"}}, {"job": parent})
    child = job(1, parentId="parent") | {"id": "child"}
    recording.call("CreateJob", {"job": {"id": "child", "parentId": "parent"}}, {"job": child})
    for number in range(jobs):
        job_id, name = f"job-{number}", {"name": "a"}
        states = [job(revision, reason=f"step {revision}", **name) | {"id": job_id} for revision in range(1, 9)]
        end = job(9, SUCCEEDED, reason="end", **name) | {"id": job_id}
        recording.call("CreateJob", {"job": {"id": job_id, "reason": "step 1"}}, {"job": states[0]})
        for state in states[1:]:
            recording.call("UpdateJob", {"job": {"id": job_id, "reason": state["reason"]}}, {"job": state})
            recording.call("GetJob", {"id": job_id}, {"job": state})
        recording.call("ListJobs", {"filter": {"names": ["a"], "done": False}}, {"jobs": [states[-1]]})
        recording.call("UpdateJob", {"job": {"id": job_id, "reason": "end"}}, {"job": end})
        child = child | {"revision": number + 2, "reason": f"{number}"}
        recording.call("UpdateJob", {"job": {"id": "child", "reason": f"{number}"}}, {"job": child})
        recording.call("ListJobs", {"filter": {"parentId": "parent"}}, {"jobs": [child]})
        recording.call("GetJob", {"id": "parent"}, {"job": parent | {"children": {child["state"][10:].lower(): 1}}})
        recording.stream(
            "WatchJob", {"id": job_id}, {"event": {"type": "JOB_EVENT_TYPE_SNAPSHOT", "job": end}}, code="OK"
        )
    return recording.entries


@pytest.mark.slow
def test_the_time_to_judge_is_nearly_linear():
    def seconds(entries):
        began = time.process_time()
        assert checker.check(entries) == []
        return time.process_time() - began

    small, large = (min(seconds(entries) for _ in range(3)) for entries in map(a_history_of, (200, 1600)))
    assert large < 24 * small, "64 times as long would be quadratic"


def test_each_rule_says_what_it_promises():
    assert all(rule.__doc__ and rule.__doc__.endswith(".") for rule in checker.RULES)
    assert pb.JOB_STATE_SUCCEEDED in checker.DONE
