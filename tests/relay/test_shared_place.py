"""Relays of one name that share a place in PostgreSQL: one delivers, and another one goes on where it ended."""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
import time
from urllib.parse import urlsplit

import pytest

from jobstatus_grpc.relay import shared_place
from tests.support.postgres import VERSIONS
from tests.support.receiver import RelayProcess
from tests.support.tcp_proxy import TcpProxy

STATES = ("PENDING", "IN_PROGRESS", "SUCCEEDED")

pytestmark = pytest.mark.slow  # starts many relays


@pytest.fixture
def cluster(postgres_shared):
    return postgres_shared(next(iter(VERSIONS)))


@pytest.fixture
def shared(service, receiver, place_url, group, tmp_path):
    """Return a relay of a name whose deliveries have its number as their path."""
    with contextlib.ExitStack() as stack:

        def make(number, *flags, url=place_url, name="a"):
            folder = tmp_path / f"relay-{number}"
            folder.mkdir()
            place = ["--state-file", url, "--relay-name", name, "--dead-letter-file", f"{folder}/dead-letters"]
            label = ["--label", f"group={group['group']}"]
            webhook = ["--webhook", f"{receiver.url}/{number}"]
            relay = RelayProcess(service.address, folder, *webhook, *label, *place, *flags)
            stack.callback(relay.kill)
            return relay

        yield make


@pytest.fixture
def load(service, make):
    """Bring jobs from state to state in the background; return what ends that and returns the ids of the ended jobs."""
    ended: list[str] = []
    is_over = threading.Event()

    def run():
        while not is_over.is_set():
            job = make("PENDING")
            service.update(job.id, state="JOB_STATE_IN_PROGRESS", attempt=1)
            ended.append(service.update(job.id, state="JOB_STATE_SUCCEEDED").id)
            is_over.wait(0.1)  # the relay that goes on has to catch up

    thread = threading.Thread(target=run)

    def stop():
        is_over.set()
        thread.join()
        return ended

    def start():
        thread.start()
        return stop

    yield start
    if thread.ident is not None:
        stop()


def states_by_job(received):
    found: dict[str, list[int]] = {}
    for each in received:
        found.setdefault(each.job["id"], []).append(STATES.index(each.job["state"].removeprefix("JOB_STATE_")))
    return found


def freeze(proxy):
    proxy.max_request_bytes = 1  # of new connections
    proxy.freeze()


@pytest.mark.parametrize("fault", ["kill", "cut", "freeze", "suspend"])
@pytest.mark.timeout(120)
def test_another_relay_goes_on_and_nothing_is_missing(shared, load, receiver, place_url, fault):
    address = urlsplit(place_url)
    with contextlib.ExitStack() as connected:
        proxy = connected.enter_context(TcpProxy(f"{address.hostname}:{address.port}"))
        first = shared(1, "--on", "state", url=place_url.replace(f"{address.hostname}:{address.port}", proxy.address))
        first.start()
        second = shared(2, "--on", "state")
        second.start(until="waiting: another relay a delivers")
        end_load = load()
        receiver.wait_for(20)
        {
            "kill": lambda: first.stop(signal.SIGKILL),
            "cut": connected.close,
            "freeze": lambda: freeze(proxy),
            "suspend": lambda: first.send(signal.SIGSTOP),
        }[fault]()
        failed_at = time.monotonic()
        received = receiver.wait_until(lambda received: received[-1].path == "/2")
        seconds = next(each.at for each in received if each.path == "/2") - failed_at
        # PostgreSQL notices the end of a connection at once. Otherwise it must not do so before the lease is over.
        has_lease = fault in ("freeze", "suspend")
        assert seconds > shared_place.LEASE_SECONDS if has_lease else seconds < shared_place.LEASE_SECONDS
        if fault == "suspend":
            first.send(signal.SIGCONT)
            first.wait_until_said("this relay delivers nothing until it has it again")
        receiver.wait_for(len(receiver.accepted) + 20)
        ended = end_load()
        done = STATES.index("SUCCEEDED")
        receiver.wait_until(lambda received: all(done in states_by_job(received).get(job, []) for job in ended))
    arrived = receiver.accepted
    # A delivery may be repeated, and what was sent before a suspension may arrive after it.
    for path in ("/1", "/2"):
        by_job = states_by_job(each for each in arrived if each.path == path)
        assert all(states == sorted(states) for states in by_job.values())
    if fault != "suspend":
        assert [path for path, _ in itertools.groupby(each.path for each in arrived)] == ["/1", "/2"]


def test_a_relay_whose_session_was_ended_goes_on(shared, load, receiver, cluster):
    relay = shared(1)
    relay.start()
    end_load = load()
    receiver.wait_for(10)
    cluster.execute("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted")
    relay.wait_until_said("this relay delivers nothing until it has it again")
    ended = end_load()
    receiver.wait_until(lambda received: {each.job["id"] for each in received} >= set(ended))
    assert relay.stop() == 0


def test_a_waiting_relay_survives_a_restart_of_its_server_and_stops_at_once(shared, new_postgres):
    url = new_postgres.url(new_postgres.create_database())
    first, second = shared(1, url=url), shared(2, url=url)
    first.start()
    second.start(until="waiting: ")
    new_postgres.restart()
    for relay in (first, second):
        relay.wait_until_said("delivers nothing until it has it again")
    first.stop()
    second.wait_until_said("relaying to ")
    first.start(until="waiting: ")
    assert [first.stop(), second.stop()] == [0, 0]


def test_relays_of_different_names_deliver_side_by_side(shared, receiver, make):
    for number, name in enumerate("ab"):
        shared(number, name=name).start()
    make()
    assert {each.path for each in receiver.wait_for(2)} == {"/0", "/1"}


@pytest.mark.parametrize(
    ("url", "code", "text"),
    [
        ("postgresql://jobstatus@127.0.0.1:1/x", 4, "the state on postgresql 127.0.0.1:1 cannot be reached: "),
        ("postgresql://a:b@c@d/x", 2, "cannot be understood"),
    ],
)
def test_a_database_that_cannot_be_used_is_one_line(shared, url, code, text):
    done = shared(1, url=url).run()
    assert (done.returncode, done.stderr.count("\n"), text in done.stderr) == (code, 1, True)


def test_a_place_of_another_kind_is_refused_although_another_relay_has_it(shared):
    shared(1).start()
    done = shared(2, "--on", "state").run()
    assert (done.returncode, "is one with --on end" in done.stderr) == (2, True)


@pytest.mark.parametrize("flags", [["--state-file", "postgresql://127.0.0.1/x"], ["--relay-name", "a"]])
def test_a_name_belongs_to_a_state_on_postgresql(refused, flags):
    code, said = refused("--exec", "true", *flags)
    assert (code, "Give --relay-name with a --state-file on PostgreSQL" in said) == (2, True)
