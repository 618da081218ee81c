"""Each fault of a server, its clock and its network by itself, and all of them at random in a long run."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter

import pytest

from tests.faults.deployment import FAKETIME, Deployment
from tests.support.judged import judged_under_faults

pytestmark = pytest.mark.slow

TIMES, TIMES_IN_FULL = 1, 30
SUSPENDED_SECONDS, SUSPENDED_SECONDS_IN_FULL = 3.0, 35.0
"""In full longer than each timeout: of calls 5 s, of keepalives 25 s."""
SUSPENSIONS_IN_FULL = 5
SOAK_INTERVAL_SECONDS = 20.0
SOAK_PART = 15
"""Faults between two judgements of a long run: a history of an hour would not fit into memory."""

OTHERS = ["set_clock", "cut", "cut_after_bytes", "black_hole", "delay", "suspend", "replace"]
"""Kills have tests of their own."""


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", OTHERS)
def test_the_service_keeps_its_promises_under_a_fault(name, tmp_path, is_full, patience_seconds, record_fault):
    if name == "set_clock" and FAKETIME is None:
        pytest.skip("libfaketime is not installed (Debian package faketime)")
    times, chance = TIMES_IN_FULL if is_full else TIMES, random.Random(1)
    suspended_seconds = SUSPENDED_SECONDS_IN_FULL if is_full else SUSPENDED_SECONDS
    if name == "suspend":
        times = min(times, SUSPENSIONS_IN_FULL)
    with Deployment(tmp_path, seed=1, suspended_seconds=suspended_seconds) as deployment:
        fault = getattr(deployment, name)
        (text,) = [text for text, one in deployment.faults().items() if one == fault]
        judging = judged_under_faults(
            [deployment.address],
            fault,
            times=times,
            writes=lambda: chance.randint(1, 200),
            seed=1,
            # A change from just before a suspension, or a black hole, arrives after it.
            patience_seconds=patience_seconds + (suspended_seconds if name == "suspend" else 2),
        )
        judged = asyncio.run(judging)
    record_fault(text, count=times, checked=judged.what, result="no violation")


@pytest.mark.timeout(7200)
def test_the_service_keeps_its_promises_under_faults_at_random(
    tmp_path, is_full, patience_seconds, pytestconfig, record_fault
):
    seconds, interval_seconds = (60 * pytestconfig.getoption("--soak"), SOAK_INTERVAL_SECONDS) if is_full else (3, 1)
    chance, done = random.Random(2), Counter[str]()
    calls = acknowledged = 0
    began_at = time.monotonic()
    with Deployment(tmp_path, seed=2, suspended_seconds=SUSPENDED_SECONDS) as deployment:
        faults = deployment.faults()

        async def random_fault():
            name = chance.choice(list(faults))
            done[name] += 1
            await faults[name]()

        while (left_seconds := began_at + seconds - time.monotonic()) > 0:
            judging = judged_under_faults(
                [deployment.address],
                random_fault,
                times=min(SOAK_PART, math.ceil(left_seconds / interval_seconds)),
                pause=lambda: interval_seconds,
                seed=done.total(),
                patience_seconds=patience_seconds + SUSPENDED_SECONDS,
            )
            judged = asyncio.run(judging)
            calls, acknowledged = calls + judged.calls, acknowledged + judged.acknowledged
    minutes = (time.monotonic() - began_at) / 60
    record_fault(
        f"a random fault every {interval_seconds:g} s for {minutes:.0f} min: "
        + ", ".join(f"{name} ({times})" for name, times in sorted(done.items())),
        count=done.total(),
        checked=f"{acknowledged:,} acknowledged writes, {calls:,} calls",
        result="no violation",
    )
