"""The log of what fails while a store is away."""

from __future__ import annotations

import logging

import pytest

from jobstatus_grpc.errors import StoreUnavailableError
from jobstatus_grpc.stores.outage_log import OutageLog
from tests.support.stores import StandingClock

AWAY = StoreUnavailableError("the disk is away")
BEGUN, OVER = "the feed is unavailable, retrying: the disk is away", "the feed has recovered"


@pytest.fixture
def clock():
    return StandingClock()


@pytest.fixture
def outage(clock):
    return OutageLog(logging.getLogger("jobstatus_grpc.tests"), "the feed", seconds=clock.seconds)


def test_a_lasting_outage_is_logged_once_a_minute(outage, clock, caplog):
    for _ in range(119):
        outage.failed(AWAY)
        clock.advance(seconds=1)
    outage.recovered()
    assert caplog.messages == [BEGUN, BEGUN, OVER]


def test_an_intermittent_outage_is_logged_once_a_minute(outage, clock, caplog):
    for _ in range(119):
        outage.failed(AWAY)
        outage.recovered()
        clock.advance(seconds=1)
    assert caplog.messages == [BEGUN, OVER] * 2


def test_without_a_failure_nothing_is_logged(outage, caplog):
    outage.recovered()
    assert caplog.messages == []


def test_a_bug_is_logged_with_its_traceback(outage, caplog):
    try:
        raise RuntimeError("a mistake")
    except RuntimeError as error:
        outage.failed(error)
    assert "test_a_bug_is_logged_with_its_traceback" in caplog.text
