"""Where a relay goes on: restarts, crashes, RESET, and who may use its file."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import time
from datetime import datetime, timedelta, timezone

import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc import AsyncJobStatusClient
from jobstatus_grpc.job import JobFilter
from jobstatus_grpc.relay import relay as relay_module
from jobstatus_grpc.relay import shared_place
from jobstatus_grpc.relay.place import BEGINNING, Delivered, FilePlace
from jobstatus_grpc.relay.relay import Relay, RelaySettings
from jobstatus_grpc.relay.shared_place import open_shared_place
from jobstatus_grpc.relay.targets import Command
from tests.support.loop import on_a_loop
from tests.support.receiver import RelayProcess

pytestmark = pytest.mark.slow  # starts many relays


def ids_in(received):
    return [each.job["id"] for each in received]


def ends_in(received):
    return [(each.job["id"], each.job["done"]) for each in received]


def change_foreign_jobs(service, update_of, new_id):
    """Change so many jobs that a watch which resumes before them gets RESET."""
    foreign = {"allow_missing": True, "labels": {"other": "x"}, "state": "JOB_STATE_SUCCEEDED"}
    for _ in range(6):
        service.batch(*(update_of(new_id(), **foreign) for _ in range(500)))


def test_what_ended_before_the_first_start_is_not_delivered(relaying, receiver, make):
    make()
    relaying("--webhook", receiver.url)
    job = make()
    assert ids_in(receiver.wait_for(1)) == [job.id]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_restart_loses_and_repeats_nothing_that_was_delivered(relaying, receiver, make, number):
    relay = relaying("--webhook", receiver.url, "--concurrency", "1")
    jobs = [make() for _ in range(10)]
    receiver.wait_for(10)
    time.sleep(0.3 if number is signal.SIGKILL else 0)  # what is delivered in the moment of a crash may be repeated
    codes = {signal.SIGTERM: 0, signal.SIGINT: 130, signal.SIGKILL: -9}
    assert relay.stop(number) == codes[number]
    jobs += [make() for _ in range(10)]
    relay.start()
    jobs.append(make())
    receiver.wait_until(lambda received: received[-1].job["id"] == jobs[-1].id)
    assert sorted(ids_in(receiver.accepted)) == sorted(job.id for job in jobs)


def test_only_jobs_that_match_are_delivered(relaying, receiver, make):
    relaying("--webhook", receiver.url, "--state", "failed", "--name-prefix", "a")
    make("FAILED", name="b")
    make("SUCCEEDED", name="a")
    job = make("FAILED", name="a")
    assert ids_in(receiver.wait_for(1)) == [job.id]


def test_each_state_is_delivered_in_order_and_progress_is_not(relaying, receiver, service, make):
    relaying("--webhook", receiver.url, "--on", "state")
    job = make("PENDING")
    steps = [("IN_PROGRESS", 1), ("RETRYING", 1), ("IN_PROGRESS", 2), ("SUCCEEDED", 2)]
    for count, (state, attempt) in enumerate(steps, start=1):
        receiver.wait_for(count)
        service.update(job.id, state=f"JOB_STATE_{state}", attempt=attempt)
        if state == "IN_PROGRESS":
            service.update(job.id, progress=50, attempt=attempt)
    received = receiver.wait_for(5)
    states = [each.job["state"].removeprefix("JOB_STATE_") for each in received]
    assert states == ["PENDING", *(state for state, _ in steps)]
    assert len({each.id for each in received}) == 5


def test_a_state_is_not_repeated_after_a_restart_by_progress_in_it(relaying, receiver, service, make):
    before = make("IN_PROGRESS")
    relay = relaying("--webhook", receiver.url, "--on", "state")
    after = make("PENDING")
    receiver.wait_for(1)
    relay.stop()
    for job in (before, after):
        service.update(job.id, reason="more")
    relay.start()
    end = service.update(before.id, state="JOB_STATE_ABORTED")
    received = receiver.wait_until(lambda received: received[-1].job["state"] == "JOB_STATE_ABORTED")
    assert ids_in(received) == [after.id, end.id]


@pytest.mark.parametrize("on", ["end", "state"])
def test_after_a_reset_what_ended_since_is_delivered_and_nothing_is_repeated(
    relaying, receiver, service, make, update_of, new_id, on
):
    make()
    open_before = make("IN_PROGRESS")
    relay = relaying("--webhook", receiver.url, "--on", on, "--concurrency", "1")
    delivered = make("FAILED")
    receiver.wait_until(lambda received: (delivered.id, True) in ends_in(received))
    relay.stop()
    count = len(receiver.accepted)
    ended = [make(), service.update(open_before.id, state="JOB_STATE_CANCELLED")]
    change_foreign_jobs(service, update_of, new_id)
    relay.start()
    relay.wait_until_said("the server no longer has all changes since the last delivery")
    last = make()
    received = receiver.wait_until(lambda received: (last.id, True) in ends_in(received))
    new = [job_id for job_id, is_done in ends_in(received[count:]) if is_done]
    assert sorted(new) == sorted(job.id for job in [*ended, last])


def test_a_job_that_is_removed_before_its_delivery_does_not_end_the_relay(relaying, receiver, service, make):
    relay = relaying("--webhook", receiver.url)
    relay.stop()
    gone = make()
    service.stub.DeleteJob(pb.DeleteJobRequest(id=gone.id), timeout=20)
    relay.start()
    job = make()
    receiver.wait_until(lambda received: job.id in ids_in(received))


def test_a_second_relay_on_the_file_is_refused(relaying, refused, receiver, make):
    relay = relaying("--webhook", receiver.url)
    for count in (1, 2):
        code, said = refused("--webhook", receiver.url)
        assert (code, said.count("\n")) == (2, 1)
        assert "another relay uses" in said
        make()
        receiver.wait_for(count)
        relay.stop()
        relay.start()


@pytest.mark.parametrize(
    ("flags", "code", "text"),
    [
        (["--on", "state"], 2, "is of a relay with --on end"),
        (["--on", "end", "--name", "other"], 2, "made for other filter flags"),
    ],
)
def test_the_file_of_another_relay_is_refused(relaying, refused, receiver, flags, code, text):
    relaying("--webhook", receiver.url).stop()
    found, said = refused("--webhook", receiver.url, *flags)
    assert (found, text in said) == (code, True)


def test_a_file_that_is_no_place_is_refused_and_left_as_it_is(refused, tmp_path):
    (tmp_path / "relay.state").write_text("shopping list, and more than a hundred bytes of it\n" * 10)
    code, said = refused("--exec", "true")
    assert (code, "cannot be used as --state-file" in said) == (2, True)
    (tmp_path / "relay.state").unlink()
    with sqlite3.connect(tmp_path / "relay.state") as database:
        database.execute("CREATE TABLE jobs (id)")
    assert "it is another file" in refused("--exec", "true")[1]
    assert "/nowhere" in RelayProcess("127.0.0.1:9", tmp_path / "nowhere", "--exec", "true").run().stderr


def test_the_file_is_for_its_owner_only(relaying, receiver):
    relay = relaying("--webhook", receiver.url)
    assert relay.state_file.stat().st_mode & 0o777 == 0o600


def test_without_a_server_the_first_start_fails(receiver, tmp_path):
    refused = RelayProcess("127.0.0.1:9", tmp_path, "--webhook", receiver.url, "--timeout", "1s").run()
    assert (refused.returncode, refused.stderr.count("\n")) == (4, 1)


def test_a_later_start_waits_for_the_server(serve, receiver, tmp_path):
    service = serve(store=f"sqlite:///{tmp_path}/jobs.db")
    relay = RelayProcess(service.address, tmp_path, "--webhook", receiver.url)
    with relay:
        relay.stop()
        service.process.kill()
        relay.start()
        service.process.start()
        job = service.job_in("SUCCEEDED")
        assert ids_in(receiver.wait_for(1)) == [job.id]


def test_a_relay_stops_at_once_while_its_receiver_is_away(relaying, receiver, make):
    receiver.answer = lambda number, headers: (503, {"Retry-After": "600"})
    relay = relaying("--webhook", receiver.url)
    for _ in range(20):
        make()
    receiver.wait_until(lambda received: bool(received))
    began_at = time.monotonic()
    assert relay.stop() == 0
    assert time.monotonic() - began_at < 4
    receiver.answer = lambda number, headers: (200, {})
    relay.start()
    assert len(set(ids_in(receiver.wait_for(20)))) == 20


def test_more_events_than_may_be_pending_are_all_delivered(relaying, receiver, service, make, update_of, group):
    receiver.answer = lambda number, headers: (503 if number < 50 else 200, {})
    relaying("--webhook", receiver.url, "--concurrency", "32")
    names = [f"{group['group']}-{number}" for number in range(1500)]
    for at in range(0, len(names), 500):
        service.batch(
            *(
                update_of(name, allow_missing=True, labels=group, state="JOB_STATE_SUCCEEDED")
                for name in names[at : at + 500]
            )
        )
    assert set(ids_in(receiver.wait_for(1500))) == set(names)


def test_dead_letters_that_cannot_be_written_are_noticed_at_the_start(refused, tmp_path):
    code, said = refused("--exec", "true", "--dead-letter-file", f"{tmp_path}/nowhere/letters")
    assert (code, said.count("\n"), "--dead-letter-file" in said) == (2, 1, True)


class WrongClock(datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime(2000, 1, 1, tzinfo=tz)


@pytest.fixture
def run_relay(service, group, tmp_path):
    """Run a relay at a place until it has begun; `changes` are attributes of its client."""

    async def run_relay(place, *, is_each_state=False, **changes):
        settings = RelaySettings(
            filter=JobFilter(labels=group), is_each_state=is_each_state, source="/", concurrency=1, retry_seconds=1,
            dead_letter_file=f"{tmp_path}/letters",
        )  # fmt: skip
        stopping = asyncio.Event()
        async with AsyncJobStatusClient(service.address) as client:
            for name, make_change in changes.items():
                setattr(client, name, make_change(getattr(client, name)))
            relay = Relay(client, Command("true", timeout_seconds=1), place, settings, to_object=lambda job: {})
            await relay.run(stopping, begun=stopping.set)

    return run_relay


@on_a_loop
async def test_the_first_place_is_at_the_time_of_the_server(run_relay, tmp_path, monkeypatch):
    place = FilePlace(f"{tmp_path}/state", "end")
    monkeypatch.setattr(relay_module, "datetime", WrongClock)
    await run_relay(place)
    assert timedelta(0) <= datetime.now(timezone.utc) - place.horizon < timedelta(minutes=1)
    await place.close()


@on_a_loop
async def test_a_first_start_saves_the_open_jobs_in_parts_and_the_token_last(run_relay, make, tmp_path, monkeypatch):
    monkeypatch.setattr(relay_module, "OPEN_JOBS_PER_SAVE", 2)
    jobs = [make("PENDING") for _ in range(5)]
    place = FilePlace(f"{tmp_path}/state", "state")
    saved = []

    async def save(delivered, token, horizon):
        saved.append(([each.job_id for each in delivered], bool(token)))
        await FilePlace.save(place, delivered, token, horizon)

    monkeypatch.setattr(place, "save", save)
    await run_relay(place, is_each_state=True)
    assert [(len(ids), has_token) for ids, has_token in saved[:4]] == [(2, False), (2, False), (1, False), (0, True)]
    assert {job_id for ids, _ in saved for job_id in ids} == {job.id for job in jobs}
    await place.close()


@on_a_loop
async def test_a_first_start_forgets_the_open_jobs_of_one_that_was_interrupted(run_relay, tmp_path):
    place = FilePlace(f"{tmp_path}/state", "state")
    await place.save([Delivered("a", "evt_a", datetime.now(timezone.utc), False)], "", BEGINNING)
    await run_relay(place, is_each_state=True)
    assert await place.last_event("a") is None
    await place.close()


@on_a_loop
async def test_a_first_start_may_take_longer_than_the_lease_of_its_place(run_relay, make, place_url, monkeypatch):
    monkeypatch.setattr(shared_place, "LEASE_SECONDS", 3)
    monkeypatch.setattr(shared_place, "BEAT_SECONDS", 0.1)
    job = make("PENDING")
    place = await open_shared_place(place_url, "a", "state", waiting=lambda: None)

    def slowly(list_all):
        async def list_slowly(filter):
            await asyncio.sleep(shared_place.LEASE_SECONDS + 0.5)
            async for each in list_all(filter):
                yield each

        return list_slowly

    await run_relay(place, is_each_state=True, list_all=slowly)
    assert (place.token != "", await place.last_event(job.id) is not None) == (True, True)
    await place.close()
