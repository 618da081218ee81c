"""`/v1/jobs…`: jobs as plain JSON of a task API and of a content queue."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
from typing import Any

import pytest

from jobstatus_grpc.job import JobState
from jobstatus_grpc.vocabularies import CONTENT_QUEUE_WORDS, TASK_API_WORDS, to_task_api
from jobstatus_grpc.web.jobs import HEARTBEAT_SECONDS
from jobstatus_grpc.web.vocabulary import TASK_API
from jobstatus_grpc.wire import convert
from tests.support.web import read_all, run_node

MERGE_PATCH = "application/merge-patch+json"


def create(web, **fields):
    reply = web.request("POST", "/v1/jobs", fields)
    assert reply.status == 201, reply.body
    return reply.json()


def events_of(web, path, **headers):
    """Read a stream of events to its end."""
    reply = web.request("GET", path, **headers)
    assert reply.headers["content-type"] == "text/event-stream"
    return [_event_in(block) for block in reply.body.decode().split("\n\n") if "data: " in block]


def _event_in(block):
    fields = dict(line.partition(": ")[::2] for line in block.split("\n"))
    return fields["event"], fields.get("id"), json.loads(fields["data"])


def first_events(web, path, last, **headers):
    """Read events up to the one with a name."""
    lines = [
        f"GET {path} HTTP/1.1",
        "host: 127.0.0.1",
        *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
    ]
    with web.raw("\r\n".join([*lines, "", ""]).encode()) as connection, connection.makefile("rb") as file:
        found, block = [], {}
        for line in file:
            name, _, value = line.decode().strip().partition(": ")
            if name in ("event", "id", "data"):
                block[name] = value
            if name == "data":
                found.append((block["event"], block.get("id"), json.loads(value)))
                if block["event"] == last:
                    return found
                block = {}
    raise AssertionError(f"the stream ended without {last}: {found}")


@pytest.fixture(scope="module")
def compiled_folder(node_folder):
    """The folder of Node.js with the TypeScript clients as JavaScript."""
    subprocess.run(["node_modules/.bin/tsc", "--project", "."], cwd=node_folder, check=True, timeout=120)
    return node_folder


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", ["task_api", "content_queue"])
def test_a_client_in_typescript_compiles_strictly_and_runs(web, compiled_folder, name):
    answer = json.loads(run_node(compiled_folder, f"{name}.js", web.url))
    if name == "task_api":
        assert [job["state"] for job in answer["seen"]] == ["pending", "in_progress", "succeeded"]
        assert (answer["seen"][-1]["progress"], answer["again"], answer["isListed"]) == (100, 304, True)
    else:
        assert answer[-1] == {
            "id": answer[0]["id"], "status": "failed", "progress": 50, "error": "out of disk",
            "estimatedCompletion": "2030-01-31T12:00:00Z",
        }  # fmt: skip


@pytest.mark.parametrize("state", JobState)
def test_a_job_in_each_state_has_the_word_of_each_vocabulary(web, web_service, state):
    job = web_service.job_in(state.name)
    path = f"/v1/jobs/{job.id}"
    task, content = web.request("GET", path).json(), web.request("GET", f"{path}?vocabulary=content").json()
    assert (task["state"], content["status"]) == (TASK_API_WORDS[state], CONTENT_QUEUE_WORDS[state])
    assert task["createdAt"].endswith("Z")
    assert set(content) <= {"id", "status", "progress", "estimatedCompletion", "error"}


@pytest.mark.parametrize(
    "accept", ['application/json; profile="content"', "application/json;profile=content, */*;q=0.1"]
)
def test_the_accept_header_may_name_the_vocabulary(web, accept):
    job = create(web)
    assert web.request("GET", f"/v1/jobs/{job['id']}", accept=accept).json() == {"id": job["id"], "status": "queued"}


def test_an_unknown_vocabulary_is_refused(web):
    assert web.request("GET", "/v1/jobs?vocabulary=x").status == 400
    assert web.request("GET", "/v1/jobs", accept="application/json; profile=x").status == 406


def test_a_created_job_has_a_place_and_a_tag(web):
    reply = web.request("POST", "/v1/jobs", {"name": "n", "hasProgress": True, "reason": None})
    job = reply.json()
    assert reply.headers["location"] == f"/v1/jobs/{job['id']}"
    assert re.fullmatch('"1-[0-9a-f]{12}"', reply.headers["etag"])
    assert job == {"id": job["id"], "name": "n", "state": "pending", "hasProgress": True, "createdAt": job["createdAt"]}
    assert web.request("GET", reply.headers["location"]).json() == job


@pytest.mark.parametrize("key", ["k-1", '"k-2"'])
def test_a_creation_with_the_same_idempotency_key_has_no_second_effect(web, key):
    replies = [web.request("POST", "/v1/jobs", {"name": "n"}, idempotency_key=key) for _ in range(2)]
    assert (replies[0].json(), replies[0].status) == (replies[1].json(), 201)
    other = web.request("POST", "/v1/jobs", {"name": "other"}, idempotency_key=key)
    assert (other.status, other.reason) == (400, "REQUEST_ID_REUSED")


def test_a_patch_writes_what_it_has_and_null_clears(web):
    path = f"/v1/jobs/{create(web, state='in_progress', progress=10, reason='r')['id']}"
    assert web.request("PATCH", path, {"progress": 20.5}).json()["reason"] == "r"
    changed = web.request("PATCH", path, {"reason": None, "state": "succeeded"}, content_type=MERGE_PATCH).json()
    assert ("reason" in changed, changed["state"], changed["progress"]) == (False, "succeeded", 100)


def test_a_document_that_was_read_can_be_sent_back(web):
    job = create(web, name="n", state="in_progress", progress=1)
    assert web.request("PATCH", f"/v1/jobs/{job['id']}", job).json() == job
    assert web.request("PATCH", f"/v1/jobs/{job['id']}", {**job, "name": "other"}).json() == job
    assert web.request("PATCH", f"/v1/jobs/{job['id']}", {**job, "id": "other"}).status == 400


def test_a_worker_claims_its_attempt(web):
    path = f"/v1/jobs/{create(web)['id']}"
    assert web.request("PATCH", f"{path}?attempt=1", {"state": "in_progress"}).status == 200
    late = web.request("PATCH", f"{path}?attempt=1", {"state": "in_progress"})
    assert (late.status, late.reason) == (409, "STALE_ATTEMPT")


def test_a_write_of_another_revision_is_refused(web):
    path = f"/v1/jobs/{create(web)['id']}"
    first = web.request("PATCH", path, {"reason": "a"}, if_match='"1"')
    assert (first.status, first.headers["etag"].startswith('"2-')) == (200, True)
    for tag in ('"1"', '"1-0123456789ab"', '"0"', 'W/"2"', '"x"', '"2-x"'):
        assert web.request("PATCH", path, {"reason": "b"}, if_match=tag).status == 412
        assert web.request("DELETE", path, if_match=tag).status in (409, 412)
    assert web.request("PATCH", path, {"reason": "b"}, if_match="2").status == 400
    assert web.request("PATCH", path, {"reason": "b"}, if_match=first.headers["etag"]).status == 200
    assert web.request("PATCH", path, {"reason": "c"}, if_match="*").status == 200


@pytest.mark.parametrize("known", ["{tag}", "W/{tag}", '"7", {tag}', "*"])
def test_a_job_that_is_known_is_not_sent_again(web, known):
    path = f"/v1/jobs/{create(web)['id']}"
    tag = web.request("GET", path).headers["etag"]
    reply = web.request("GET", path, if_none_match=known.format(tag=tag))
    assert (reply.status, reply.body, reply.headers["etag"]) == (304, b"", tag)


def test_the_two_vocabularies_of_a_job_have_two_tags(web):
    path = f"/v1/jobs/{create(web)['id']}"
    reply = web.request("GET", path)
    content = {"accept": "application/json; profile=content"}
    other = web.request("GET", path, if_none_match=reply.headers["etag"], **content)
    assert (other.status, other.json()["status"]) == (200, "queued")
    assert web.request("GET", path, if_none_match='"1"').status == 200


def test_jobs_of_two_tenants_with_one_id_have_two_tags(serve_web, auth):
    one, two = (f"Bearer {auth.admit(tenant, tenant=tenant)}" for tenant in ("one", "two"))
    _, web = serve_web("--auth", str(auth.path))
    first = web.request("POST", "/v1/jobs", {"id": "nightly", "name": "that of one"}, authorization=one)
    web.request("POST", "/v1/jobs", {"id": "nightly", "name": "that of two"}, authorization=two)
    tag = first.headers["etag"]
    assert web.request("GET", "/v1/jobs/nightly", authorization=one, if_none_match=tag).status == 304
    reply = web.request("GET", "/v1/jobs/nightly", authorization=two, if_none_match=tag)
    assert (reply.status, reply.json()["name"]) == (200, "that of two")


def long_poll(web, path, tag, change, **headers):
    """Return the reply to a request that waits while `change` is called."""
    replies = []
    asking = threading.Thread(target=lambda: replies.append(web.request("GET", path, if_none_match=tag, **headers)))
    asking.start()
    change()
    asking.join(10)
    return replies[0]


def test_a_long_poll_returns_at_the_change(web):
    path = f"/v1/jobs/{create(web)['id']}"
    tag = web.request("GET", path).headers["etag"]
    reply = long_poll(web, path, tag, lambda: web.request("PATCH", path, {"state": "in_progress"}), prefer="wait=30")
    assert (reply.status, reply.json()["state"], reply.headers["etag"][:3]) == (200, "in_progress", '"2-')


def test_a_long_poll_without_a_change_returns_after_its_time(web):
    started = time.monotonic()
    path = f"/v1/jobs/{create(web)['id']}"
    tag = web.request("GET", path).headers["etag"]
    reply = web.request("GET", path, if_none_match=tag, prefer="respond-async, wait=1")
    assert (reply.status, reply.headers["preference-applied"]) == (304, "wait=1")
    assert time.monotonic() - started >= 1


def test_heartbeats_and_changes_of_children_end_no_long_poll(web, web_service):
    job = web_service.create(state="JOB_STATE_IN_PROGRESS", heartbeat_timeout={"seconds": 600})
    path = f"/v1/jobs/{job.id}"
    tag = web.request("GET", path).headers["etag"]

    def change():
        web.request("PATCH", path, {})
        web_service.create(parent_id=job.id)

    assert long_poll(web, path, tag, change, prefer="wait=1").status == 304
    assert web_service.get(job.id).last_heartbeat_at.ToDatetime() > job.last_heartbeat_at.ToDatetime()


def test_a_stall_ends_a_long_poll(web, web_service):
    job = web_service.create(state="JOB_STATE_IN_PROGRESS", heartbeat_timeout={"seconds": 1})
    tag = f'"{TASK_API.tagged(job)[0]}"'  # also if it stalls before the request
    reply = web.request("GET", f"/v1/jobs/{job.id}", if_none_match=tag, prefer="wait=30")
    assert (reply.status, reply.headers["etag"] == tag) == (200, False)


def test_a_long_poll_of_a_done_job_does_not_wait(web, web_service):
    path = f"/v1/jobs/{web_service.job_in('SUCCEEDED').id}"
    tag = web.request("GET", path).headers["etag"]
    started = time.monotonic()
    assert web.request("GET", path, if_none_match=tag, prefer="wait=30").status == 304
    assert time.monotonic() - started < 5


def test_a_cancel_may_take_all_jobs_below(web):
    parent = create(web)["id"]
    job = {"parentId": parent}
    child = web.request("POST", "/jobstatus.v1.JobStatusService/CreateJob", {"job": job}).json()["job"]["id"]
    malformed: list[Any] = [{"cascade": "yes"}, {"cascades": True}, {"reason": 5}, {"reason": "\ud800"}, {"\ud800": 1}]
    for body in [*malformed, []]:
        reply = web.request("POST", f"/v1/jobs/{parent}:cancel", body)
        assert (reply.status, reply.reason) == (400, "INVALID_FIELD")
        assert reply.json()["violations"][0]["field"] == next(iter(body), "")
    assert web.request("GET", f"/v1/jobs/{parent}").json()["state"] == "pending"
    assert web.request("POST", f"/v1/jobs/{parent}:cancel", {"cascade": True}).json()["state"] == "aborted"
    assert web.request("GET", f"/v1/jobs/{child}").json()["state"] == "aborted"


def test_a_cancelled_job_is_aborted_and_can_be_deleted(web):
    path = f"/v1/jobs/{create(web)['id']}"
    assert web.request("DELETE", path).reason == "JOB_NOT_DONE"
    assert web.request("POST", f"{path}:cancel", {"reason": "no need"}).json()["state"] == "aborted"
    assert web.request("POST", f"{path}:cancel").status == 200
    assert web.request("DELETE", path).status == 204
    gone = web.request("GET", path)
    assert (gone.status, gone.reason, gone.headers["content-type"]) == (404, "JOB_EXPIRED", "application/problem+json")


def test_a_cancel_of_one_revision_is_refused(web):
    path = f"/v1/jobs/{create(web)['id']}"
    for tag in ('"1"', web.request("GET", path).headers["etag"]):
        assert web.request("POST", f"{path}:cancel", if_match=tag).status == 400
    assert web.request("GET", path).json()["state"] == "pending"
    assert web.request("POST", f"{path}:cancel", if_match="*").json()["state"] == "aborted"


def test_pages_follow_by_their_link(web, new_id):
    name = new_id()
    ids = [create(web, name=name)["id"] for _ in range(5)]
    found, path = [], f"/v1/jobs?name={name}&pageSize=2"
    while path:
        reply = web.request("GET", path)
        found += [job["id"] for job in reply.json()]
        path = (reply.headers["link"] or "").partition(">")[0].removeprefix("<")
    assert found == ids[::-1]


def test_filters_of_a_list_are_those_of_the_api(web, web_service, new_id):
    name = new_id()
    jobs = {state.name: web_service.create(name=f"{name}-x", labels={"n": name, "s": state.name}) for state in JobState}
    web_service.update(jobs["FAILED"].id, state="JOB_STATE_FAILED")
    web_service.update(jobs["CANCELLED"].id, state="JOB_STATE_CANCELLED")
    everything = f"label=n={name}"
    for query, states in {
        "state=failed": {"FAILED"},
        "state=aborted": {"CANCELLED"},
        "done=true": {"FAILED", "CANCELLED"},
        "done=false&label=s=PENDING": {"PENDING"},
        f"namePrefix={name}&vocabulary=content&state=failed&state=cancelled": {"FAILED", "CANCELLED"},
        f"id={jobs['PENDING'].id}&id={jobs['FAILED'].id}": {"PENDING", "FAILED"},
        f"name={name}-x&createdAfter=2000-01-01T00:00:00%2B01:00": set(jobs),
        "createdBefore=2000-01-01T00:00:00Z": set(),
        "parentId=none": set(),
        "stalled=true": set(),
    }.items():
        found = {job["id"] for job in web.request("GET", f"/v1/jobs?{everything}&{query}").json()}
        assert found == {jobs[state].id for state in states}, query


@pytest.mark.parametrize(
    "query",
    ["state=x", "state=completed", "label=x", "label=a=1&label=a=2", "done=1", "createdAfter=now", "id=%20",
     "parentId=", "pageSize=-1", "pageSize=x", "pageToken=x", "nonsense=1", "done=true&done=true", "name=%ff"],
)  # fmt: skip
def test_a_query_that_is_not_valid_is_a_problem(web, query):
    reply = web.request("GET", f"/v1/jobs?{query}")
    assert (reply.status, reply.headers["content-type"]) == (400, "application/problem+json")
    assert set(reply.json()) <= {"title", "status", "detail", "reason", "metadata", "violations"}


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"null", b"{", b"\xff", b"[" * 60_000, b'{"progress": NaN}', b'{"progress": 1e999}',
        b'{"state": "failed", "progress": 101}', b'{"name": 1}', b'{"name": "a", "name": "b"}', b'{"name": "\\ud800"}',
        b'{"name": "a\\u0000"}', b'{"nam": "a"}', b'{"state": "x"}', b'{"status": "queued"}',
    ],
    ids=range(16),
)  # fmt: skip
def test_a_body_that_is_not_valid_names_its_fields(web, body):
    reply = web.request("POST", "/v1/jobs", body, content_type="application/json")
    assert (reply.status, reply.reason) == (400, "INVALID_FIELD")
    assert reply.json()["violations"]


def escaped(text):
    return "".join(f"\\u{ord(each):04x}" for each in text)


def test_the_longest_fields_fit_with_escapes_and_a_longer_body_is_refused(web, new_id):
    fields = {"id": new_id().ljust(128, "x"), "name": "n" * 256, "reason": "r" * 4096}
    document = ",".join(f'"{name}":"{escaped(value)}"' for name, value in fields.items())
    reply = web.request("POST", "/v1/jobs", f"{{{document}}}".encode(), content_type="application/json")
    assert (reply.status, reply.json().items() >= fields.items()) == (201, True)
    path = f"/v1/jobs/{fields['id']}"
    for method, place in (("POST", "/v1/jobs"), ("PATCH", path), ("POST", f"{path}:cancel")):
        body = b'{"reason":"%s"}' % (b"r" * 65536)
        assert web.request(method, place, body, content_type="application/json").status == 413


def test_other_content_types_are_refused(web):
    path = f"/v1/jobs/{create(web)['id']}"
    posted = web.request("POST", "/v1/jobs", b"name=x", content_type="application/x-www-form-urlencoded")
    patched = web.request("PATCH", path, b"[]", content_type="application/json-patch+json")
    assert (posted.status, posted.headers["accept-post"]) == (415, "application/json")
    assert (patched.status, patched.headers["accept-patch"]) == (415, f"application/json, {MERGE_PATCH}")
    cancelled = web.request("POST", f"{path}:cancel", b"{}", content_type="application/x-www-form-urlencoded")
    assert (cancelled.status, cancelled.headers["accept-post"]) == (415, "application/json")


@pytest.mark.parametrize(
    "path",
    ["/v1", "/v1/jobs/", "/v1/jobsx", "/v1/jobs//events", "/v1/jobs/a/b", "/v1/jobs/a/events/", "/v1/jobs/a/b/c"],
)
def test_nothing_is_beside_the_paths(web, path):
    assert web.request("GET", path).status == 404


@pytest.mark.parametrize("path", ["/v1/jobs/a%2Fb", "/v1/jobs/%2e%2e%2f", "/v1/jobs/%ff", "/v1/jobs/%20"])
def test_an_id_that_is_none_is_not_valid(web, path):
    assert web.request("GET", path).status == 400


@pytest.mark.parametrize(
    ("job_id", "part"), [("events", "%65vents"), ("a:cancel", "a%3Acancel"), ("a:b.c_d-e", "a:b.c_d-e")]
)
def test_each_id_has_a_path_which_is_its_location(web, job_id, part):
    place = web.request("POST", "/v1/jobs", {"id": job_id}).headers["location"]
    assert place == f"/v1/jobs/{part}"
    assert web.request("GET", place).json()["id"] == job_id


def test_head_has_the_fields_of_get(web):
    path = f"/v1/jobs/{create(web)['id']}"
    reply = web.request("HEAD", path)
    assert (reply.status, reply.body, reply.headers["etag"]) == (200, b"", web.request("GET", path).headers["etag"])


def test_head_of_events_has_the_status_of_get_and_opens_no_stream(web):
    path = f"/v1/jobs/{create(web)['id']}"
    for events in ("/v1/jobs/events", f"{path}/events"):
        reply = web.request("HEAD", events)
        assert (reply.status, reply.headers["content-type"], reply.body) == (200, "text/event-stream", b"")
    assert web.request("HEAD", "/v1/jobs/unknown/events").status == 404
    web.request("POST", f"{path}:cancel")
    last = {"last_event_id": web.request("GET", path).headers["etag"].strip('"')}
    assert [web.request(method, f"{path}/events", **last).status for method in ("HEAD", "GET")] == [204, 204]


def test_head_of_events_is_refused_as_get_is(serve_web, auth):
    token = auth.admit("anna", more="\n[limits.principals.anna]\nwatches = 1\n")
    _, web = serve_web("--auth", str(auth.path))
    assert [web.request("HEAD", path).status for path in ("/v1/jobs/events", "/v1/jobs/x/events")] == [401, 401]
    known = {"authorization": f"Bearer {token}"}
    stream = web.stream("WatchJobs", {}, **known)
    next(stream)
    assert web.request("HEAD", "/v1/jobs/events", **known).status == 429


def test_a_stream_that_continues_after_the_newest_event_begins_at_once(web):
    path = f"/v1/jobs/{create(web)['id']}"
    tag = web.request("GET", path).headers["etag"].strip('"')
    request = f"GET {path}/events HTTP/1.1\r\nhost: localhost\r\nlast-event-id: {tag}\r\n\r\n"
    with web.raw(request.encode()) as connection:
        connection.settimeout(HEARTBEAT_SECONDS / 2)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")


def test_the_events_of_a_job_end_with_its_end(web, web_service):
    path = f"/v1/jobs/{create(web, hasProgress=True)['id']}"
    found = []
    reading = threading.Thread(target=lambda: found.extend(events_of(web, f"{path}/events")))
    reading.start()
    web.request("PATCH", path, {"state": "in_progress"})
    web.request("PATCH", path, {"state": "succeeded", "reason": "a\nb"})
    reading.join(10)
    assert (found[-1][0] in ("updated", "snapshot"), found[-1][2]["state"], found[-1][2]["reason"]) == (
        True, "succeeded", "a\nb",
    )  # fmt: skip
    again = web.request("GET", f"{path}/events", last_event_id=found[-1][1])
    assert (again.status, again.body) == (204, b"")
    assert events_of(web, f"{path}/events?vocabulary=content", last_event_id="1")[-1][2]["status"] == "completed"


@pytest.mark.parametrize("last", ["{revision}", "{revision}-0123456789ab", "1"])
def test_a_final_state_of_another_job_at_the_same_revision_is_sent(web, web_service, last):
    job = web_service.job_in("SUCCEEDED")
    last_event_id = last.format(revision=job.revision)
    (event,) = events_of(web, f"/v1/jobs/{job.id}/events", last_event_id=last_event_id)
    assert (event[0], event[2]["state"]) == ("snapshot", "succeeded")


@pytest.mark.parametrize("last", ["x", "1-", "1-x", "-0123456789ab", "1-0123456789ab ,", "1" * 19])
def test_what_is_no_id_of_an_event_is_refused(web, last):
    reply = web.request("GET", f"/v1/jobs/{create(web)['id']}/events", last_event_id=last)
    assert (reply.status, reply.reason) == (400, "INVALID_TOKEN")


def test_events_of_an_unknown_job_are_a_problem(web):
    reply = web.request("GET", "/v1/jobs/unknown/events")
    assert (reply.status, reply.reason) == (404, "JOB_NOT_FOUND")


def test_the_events_of_many_jobs_resume_after_the_last_one(web, new_id, web_service):
    name = new_id()
    first = web_service.create(name=name, labels={"n": name})
    path = f"/v1/jobs/events?label=n={name}"
    (snapshot, synced) = first_events(web, path, "synced")
    assert (snapshot[2]["id"], synced[2]) == (first.id, {})
    web_service.update(first.id, state="JOB_STATE_FAILED")
    second = web_service.create(name=name, labels={"n": name})
    resumed = first_events(web, path, "synced", last_event_id=synced[1])
    assert {event[2].get("id") for event in resumed} == {first.id, second.id, None}
    assert "snapshot" not in {event[0] for event in resumed}


def test_a_token_of_another_store_begins_anew(web, serve_web):
    (*_, synced) = first_events(web, "/v1/jobs/events?name=a", "synced")
    _, other = serve_web()
    found = first_events(other, "/v1/jobs/events?name=a", "synced", last_event_id=synced[1])
    assert [event[0] for event in found] == ["reset", "synced"]


def test_a_token_of_another_filter_is_refused(web):
    (*_, synced) = first_events(web, "/v1/jobs/events?name=a", "synced")
    reply = web.request("GET", "/v1/jobs/events?name=b", last_event_id=synced[1])
    assert (reply.status, reply.reason) == (400, "INVALID_TOKEN")


@pytest.mark.slow
def test_the_end_of_the_server_is_a_problem_on_a_stream(serve_web):
    service, web = serve_web()
    job = create(web)
    connection = web.raw(f"GET /v1/jobs/{job['id']}/events HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
    assert b"event: snapshot" in connection.recv(65536) + connection.recv(65536)
    assert service.process.terminate() == 0
    assert b'"reason":"DRAINING"' in read_all(connection)


def test_a_form_of_the_vocabularies_is_the_public_one(web, web_service):
    job = web_service.job_in("FAILED")
    assert web.request("GET", f"/v1/jobs/{job.id}").json() == to_task_api(convert.job_from_wire(job))


def test_a_caller_without_an_identity_is_told_how_to_come_by_one(serve_web, auth):
    auth.admit("boss")
    _, web = serve_web("--auth", str(auth.path))
    reply = web.request("GET", "/v1/jobs")
    assert (reply.status, reply.reason, reply.headers["www-authenticate"]) == (401, "NO_IDENTITY", "Bearer")
