"""The log of the feed's outages."""

from __future__ import annotations

from jobstatus_grpc.watch import publisher
from tests.support.hub import run, turns


def test_an_interruption_of_the_feed_is_logged_when_it_begins_and_when_it_is_over(monkeypatch, caplog):
    monkeypatch.setattr(publisher, "RETRY_SECONDS", 0)

    async def scenario(hub):
        hub.store.failures = 50
        await hub.update(reason="x")  # lets the hub read again
        await turns(200)

    run(scenario)
    assert caplog.messages == [
        "the change feed is unavailable, retrying: the disk is away",
        "the change feed has recovered",
    ]
