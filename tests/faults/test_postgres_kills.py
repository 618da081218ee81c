"""Replicas, the database and connections are killed under load: nothing that was acknowledged is lost."""

from __future__ import annotations

import asyncio
import itertools
import random

import pytest

from tests.support.load import CUT_ALL, CUT_LISTENERS, harmed_under_load, replicas

pytestmark = pytest.mark.slow

REPLICA_KILLS, REPLICA_KILLS_IN_FULL = 2, 30
DATABASE_KILLS, DATABASE_KILLS_IN_FULL = 1, 10
CUTS, CUTS_IN_FULL = 1, 20


@pytest.mark.timeout(300)
def test_nothing_acknowledged_is_lost_when_replicas_are_killed(postgres_url, is_full):
    chance = random.Random(1)
    with replicas(postgres_url) as servers:
        turns = itertools.cycle(servers)

        async def kill_one():
            server = next(turns)
            await asyncio.to_thread(server.kill)
            await asyncio.sleep(chance.uniform(0, 0.5))
            await asyncio.to_thread(server.start)

        times = REPLICA_KILLS_IN_FULL if is_full else REPLICA_KILLS
        scenario = harmed_under_load(servers, kill_one, times=times, pause=lambda: chance.uniform(0.1, 1))
        asyncio.run(asyncio.wait_for(scenario, 280))


@pytest.mark.timeout(300)
def test_nothing_acknowledged_is_lost_when_the_database_is_killed(new_postgres, is_full):
    chance = random.Random(2)

    async def kill_database():
        await asyncio.to_thread(new_postgres.kill)
        await asyncio.sleep(chance.uniform(0, 1))
        await asyncio.to_thread(new_postgres.start)

    times = DATABASE_KILLS_IN_FULL if is_full else DATABASE_KILLS
    with replicas(new_postgres.url(new_postgres.create_database())) as servers:
        scenario = harmed_under_load(servers, kill_database, times=times, pause=lambda: chance.uniform(0.3, 1))
        asyncio.run(asyncio.wait_for(scenario, 280))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("command", [CUT_LISTENERS, CUT_ALL], ids=["the listeners", "all"])
def test_nothing_acknowledged_is_lost_when_connections_are_cut(new_postgres, is_full, command):
    chance = random.Random(3)

    async def cut():
        assert await asyncio.to_thread(new_postgres.execute, command)

    times = CUTS_IN_FULL if is_full else CUTS
    with replicas(new_postgres.url(new_postgres.create_database())) as servers:
        scenario = harmed_under_load(servers, cut, times=times, pause=lambda: chance.uniform(0.6, 1.2))
        asyncio.run(asyncio.wait_for(scenario, 280))
