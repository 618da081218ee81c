"""Jobs as a task API's and a content queue's JSON: over all states and all sets of optional fields, both ways."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from jobstatus_grpc.errors import InvalidFieldError
from jobstatus_grpc.job import Job, JobError, JobState, Update, apply
from jobstatus_grpc.vocabularies import from_content_queue, from_task_api, to_content_queue, to_task_api, writable

CREATED_AT = datetime(2026, 1, 31, 12, 0, 0, tzinfo=timezone.utc)
UPDATED_AT = datetime(2026, 1, 31, 12, 0, 0, 250_000, tzinfo=timezone.utc)
DUE_AT = datetime(2026, 2, 1, 0, 0, 0, 1, tzinfo=timezone.utc)

S = JobState
# DESIGN §1, row by row.
TASK_API_WORDS = {
    S.PENDING: "pending",
    S.IN_PROGRESS: "in_progress",
    S.RETRYING: "retrying",
    S.SUCCEEDED: "succeeded",
    S.ABORTED: "aborted",
    S.FAILED: "failed",
    S.CANCELLED: "aborted",
}
CONTENT_QUEUE_WORDS = {
    S.PENDING: "queued",
    S.IN_PROGRESS: "processing",
    S.RETRYING: "processing",
    S.SUCCEEDED: "completed",
    S.ABORTED: "cancelled",
    S.FAILED: "failed",
    S.CANCELLED: "cancelled",
}

# Each optional field of a job: its value, and the member that it adds to the document, if any.
OPTIONAL: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "reason": ("reading", {"reason": "reading"}, {}),
    "reports_progress": (True, {"hasProgress": True}, {}),
    "progress": (12.5, {"progress": 12.5}, {"progress": 12.5}),
    "updated_at": (UPDATED_AT, {"updatedAt": "2026-01-31T12:00:00.250Z"}, {}),
    "estimated_completion": (DUE_AT, {}, {"estimatedCompletion": "2026-02-01T00:00:00.000001Z"}),
    "error": (JobError(8, "disk full", "NO_SPACE"), {}, {"error": "disk full"}),
    "result": ({"rows": 1}, {}, {}),
}


def job_with(state: JobState, fields: tuple[str, ...]) -> Job:
    values = {"updated_at": CREATED_AT, **{field: OPTIONAL[field][0] for field in fields}}
    return Job(id="a", name="import", state=state, created_at=CREATED_AT, **values)


def jobs() -> Iterator[tuple[Job, dict[str, Any], dict[str, Any]]]:
    """Every state with every set of optional fields, and what each vocabulary makes of it."""
    for state, count in itertools.product(JobState, range(len(OPTIONAL) + 1)):
        for fields in itertools.combinations(OPTIONAL, count):
            task = {"id": "a", "name": "import", "createdAt": "2026-01-31T12:00:00Z", "state": TASK_API_WORDS[state]}
            content = {"id": "a", "status": CONTENT_QUEUE_WORDS[state]}
            for field in fields:
                task |= OPTIONAL[field][1]
                content |= OPTIONAL[field][2]
            yield job_with(state, fields), task, content


def through_json(document: Any) -> Any:
    return json.loads(json.dumps(document, allow_nan=False))


def test_every_job_is_written_exactly_as_a_task_api_has_it():
    for job, task, _ in jobs():
        assert through_json(to_task_api(job)) == task


def test_every_job_is_written_exactly_as_a_content_queue_has_it():
    for job, _, content in jobs():
        assert through_json(to_content_queue(job)) == content


def test_every_task_is_the_same_when_read_and_written_again():
    for _, task, _ in jobs():
        assert to_task_api(Job(**from_task_api(task))) == task


def test_every_entry_of_a_content_queue_is_the_same_when_read_and_written_again():
    for _, _, content in jobs():
        job = Job(**from_content_queue(content), created_at=CREATED_AT, updated_at=UPDATED_AT)
        assert to_content_queue(job) == content


def test_what_a_task_says_of_a_job_is_what_the_job_has():
    for job, task, _ in jobs():
        known = from_task_api(task)
        state = known.pop("state")
        assert state is (S.ABORTED if job.state is S.CANCELLED else job.state)
        assert known == {name: getattr(job, name) for name in known}


def test_what_a_content_queue_says_of_a_job_is_what_the_job_has():
    for job, _, content in jobs():
        known = from_content_queue(content)
        assert known.pop("error", None) == (job.error and JobError(2, "disk full"))
        shares_its_word = {state for state, word in CONTENT_QUEUE_WORDS.items() if word == content["status"]}
        assert {known.pop("state"), job.state} <= shares_its_word
        assert known == {name: getattr(job, name) for name in known}


@pytest.mark.parametrize(
    ("document", "state"),
    [
        ({"status": "processing"}, S.IN_PROGRESS),
        ({"status": "processing", "error": "timed out"}, S.RETRYING),
        ({"status": "cancelled"}, S.CANCELLED),
    ],
)
def test_a_word_that_two_states_share_is_read_as_the_likelier(document, state):
    assert from_content_queue(document)["state"] is state


def test_an_error_without_a_message_is_written_as_its_reason():
    job = Job(id="a", state=S.FAILED, created_at=CREATED_AT, updated_at=UPDATED_AT, error=JobError(8, "", "NO_SPACE"))
    assert to_content_queue(job)["error"] == "NO_SPACE"


@pytest.mark.parametrize(("progress", "text"), [(0.0, "0"), (12.0, "12"), (99.5, "99.5"), (100.0, "100")])
def test_whole_percents_are_written_without_a_fraction(progress, text):
    job = Job(id="a", state=S.IN_PROGRESS, created_at=CREATED_AT, updated_at=UPDATED_AT, progress=progress)
    assert json.dumps(to_content_queue(job)["progress"]) == text


@pytest.mark.parametrize(
    ("text", "instant"),
    [
        ("2026-01-31T12:00:00Z", CREATED_AT),
        ("2026-01-31t12:00:00z", CREATED_AT),
        ("2026-01-31T13:30:00+01:30", CREATED_AT),
        ("2026-01-31T02:00:00.000-10:00", CREATED_AT),
        ("2026-01-31T12:00:00.25Z", UPDATED_AT),
        ("2026-01-31T12:00:00.250000999Z", UPDATED_AT),
        ("0001-01-01T00:00:00Z", datetime.min.replace(tzinfo=timezone.utc)),
        ("9999-12-31T23:59:59.999999Z", datetime.max.replace(tzinfo=timezone.utc)),
    ],
)
def test_every_form_of_rfc_3339_is_read_as_utc(text, instant):
    known = from_task_api({"createdAt": text})["created_at"]
    assert (known, known.utcoffset()) == (instant, timedelta())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2026-01-31",
        "2026-01-31T12:00:00",
        "2026-01-31 12:00:00Z",
        "2026-02-30T12:00:00Z",
        "2026-01-31T24:00:01Z",
        "2026-01-31T12:00:00+25:00",
        "2026-01-31T12:00:00.Z",
        "2026-01-31T12:00:00Z\n",
        "٢٠٢٦-01-31T12:00:00Z",
        "0001-01-01T00:00:00+01:00",
        "9999-12-31T23:59:59-01:00",
        1769860800,
    ],
)
def test_what_is_not_a_time_is_refused(text):
    with pytest.raises(InvalidFieldError, match="createdAt: must be a"):
        from_task_api({"createdAt": text})


def test_a_time_of_another_zone_is_written_in_utc():
    east = timezone(timedelta(hours=9))
    job = Job(id="a", state=S.PENDING, created_at=CREATED_AT.astimezone(east), updated_at=CREATED_AT)
    assert to_task_api(job) == {"id": "a", "name": "", "state": "pending", "createdAt": "2026-01-31T12:00:00Z"}


def test_part_of_a_document_says_only_what_is_in_it():
    body = {"progress": 40, "reason": None, "somethingElse": 1}
    assert from_task_api(body) == from_content_queue(body) == {"progress": 40.0}


def test_all_violations_of_a_document_are_reported_at_once():
    wrong = {"id": 7, "state": "done", "hasProgress": "yes", "progress": True, "updatedAt": "now"}
    with pytest.raises(InvalidFieldError) as caught:
        from_task_api(wrong)
    assert {violation.field: violation.description for violation in caught.value.violations} == {
        "id": "must be a string",
        "state": "must be one of pending, in_progress, retrying, succeeded, aborted, failed",
        "hasProgress": "must be true or false",
        "progress": "must be a number",
        "updatedAt": "must be a time such as 2026-01-31T12:00:00Z",
    }


@pytest.mark.parametrize("read", [from_task_api, from_content_queue])
@pytest.mark.parametrize("document", [None, [], "queued", 1])
def test_what_is_not_an_object_is_refused(read: Callable[[object], Any], document):
    with pytest.raises(InvalidFieldError, match="must be a JSON object"):
        read(document)


def report(job: Job | None, known: dict[str, Any]) -> Job:
    """The job after a report that a gateway passes on."""
    changes = writable(known)
    update = Update(id=changes.pop("id"), name=changes.pop("name", ""), changes=changes, allow_missing=True)
    return apply(job, update, now=UPDATED_AT, retention=timedelta(days=1)).job


def test_a_worker_may_report_in_the_words_of_a_content_queue():
    job = None
    for entry in (
        {"id": "a", "status": "queued"},
        {"id": "a", "status": "processing", "progress": 10},
        {"id": "a", "status": "processing", "progress": 10, "error": "timed out"},
        {"id": "a", "status": "processing"},
        {"id": "a", "status": "failed", "progress": 60, "error": "timed out again"},
    ):
        job = report(job, from_content_queue(entry))
        assert to_content_queue(job) == entry
    assert job is not None
    assert (job.state, job.attempt, job.error) == (S.FAILED, 2, JobError(2, "timed out again"))


def test_a_worker_may_report_in_the_words_of_a_task_api():
    job = None
    for state, progress in (
        ("pending", 0),
        ("in_progress", 50),
        ("retrying", 50),
        ("in_progress", 0),
        ("succeeded", 100),
    ):
        task = {"id": "a", "name": "import", "state": state, "reason": f"now {state}", "hasProgress": True}
        task |= {"progress": progress, "createdAt": "2026-01-31T12:00:00.250Z"}
        job = report(job, from_task_api(task))
        assert to_task_api(job) == task


def test_an_empty_error_is_none():
    assert "error" not in from_content_queue({"id": "a", "status": "completed", "error": ""})
    assert from_content_queue({"status": "processing", "error": ""})["state"] is S.IN_PROGRESS
    job = Job(id="a", state=S.FAILED, created_at=CREATED_AT, updated_at=UPDATED_AT, error=JobError(2))
    assert "error" not in to_content_queue(job)


@pytest.mark.parametrize("before", [None, {"id": "a", "status": "queued"}])
def test_processing_with_an_error_is_accepted_as_the_first_report(before):
    job = report(None, from_content_queue(before)) if before else None
    entry = {"id": "a", "status": "processing", "error": "timed out"}
    job = report(job, from_content_queue(entry))
    assert (job.state, job.attempt, job.started_at) == (S.RETRYING, 1, UPDATED_AT)
    assert to_content_queue(job) == entry
    ended = report(job, from_content_queue({"id": "a", "status": "failed", "error": "timed out again"}))
    assert (ended.state, ended.attempt) == (S.FAILED, 1)


@pytest.mark.parametrize(
    ("read", "field"), [(from_task_api, "name"), (from_task_api, "reason"), (from_content_queue, "error")]
)
def test_a_lone_surrogate_is_refused_as_the_field_it_is_in(read, field):
    with pytest.raises(InvalidFieldError) as caught:
        read({"id": "a", field: "x\ud800"})
    assert [violation.field for violation in caught.value.violations] == [field]


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("one\r\ntwo", "one\ntwo"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("bell\x07 nul\x00", "bell  nul "),
        ("x" * 5000, "x" * 4096),
    ],
)
def test_what_the_service_refuses_in_a_final_report_is_cleaned(text, clean):
    assert from_content_queue({"status": "failed", "error": text})["error"] == JobError(2, clean)
    assert from_task_api({"state": "failed", "reason": text})["reason"] == clean
