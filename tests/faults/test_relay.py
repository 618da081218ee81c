"""`kill -9` of a relay and of its server, while the receiver fails at times: every end arrives, and in order."""

from __future__ import annotations

import random
import time
from collections import defaultdict

import pytest

from tests.support.receiver import Receiver, RelayProcess
from tests.support.servers import ServerProcess
from tests.support.service import Service

KILLS, KILLS_IN_FULL = 4, 100
ANSWERS = (200, 200, 200, 500, 503, 0)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("on", ["end", "state"])
def test_no_end_is_lost_when_relay_and_server_are_killed_at_random(tmp_path, is_full, record_fault, on):
    chance = random.Random(on)
    kills = KILLS_IN_FULL if is_full else KILLS
    with (
        Receiver(lambda number, headers: (random.choice(ANSWERS), {})) as receiver,
        ServerProcess(store=f"sqlite:///{tmp_path}/jobs.db") as server,
        RelayProcess(server.address, tmp_path, "--webhook", receiver.url, "--on", on) as relay,
    ):
        service = Service(server.address, server)
        ended = set()
        for number in range(kills):
            for _ in range(20):
                ended.add(service.job_in(chance.choice(["SUCCEEDED", "FAILED", "ABORTED"])).id)
                time.sleep(chance.uniform(0, 0.02))
            if number % 2:
                server.restart()
            relay.kill()
            relay.start()
        service.close()
        receiver.wait_until(
            lambda received: ended <= {each.job["id"] for each in received if each.status == 200 and each.job["done"]}
        )
        assert relay.dead_letters == []
    accepted = receiver.accepted
    assert_one_id_for_each_event(receiver.received)
    assert_in_order(accepted)
    record_fault(
        f"`kill -9` of `jobstatus relay --on {on}` and its server at random",
        count=kills,
        checked=f"{len(ended):,} ends, {len(receiver.received):,} requests",
        result=f"none lost, {len(accepted) - len({each.id for each in accepted})} repeated with their id",
    )


def assert_one_id_for_each_event(received):
    events, ids = defaultdict(set), defaultdict(set)
    for each in received:
        event = (each.job["id"], each.job["state"], each.job["attempt"])
        events[each.id].add(event)
        ids[event].add(each.id)
    assert {len(found) for found in (*events.values(), *ids.values())} == {1}


def assert_in_order(accepted):
    """The first time that each event of a job arrives is after those before it."""
    first = {each.id: each for each in reversed(accepted)}
    revisions = defaultdict(list)
    for each in sorted(first.values(), key=lambda each: each.at):
        revisions[each.job["id"]].append(int(each.job["revision"]))
    assert all(found == sorted(found) for found in revisions.values())
