"""What Dramatiq's worker runs in the tests."""

# mypy: disable-error-code="union-attr"

from __future__ import annotations

import os
import time

import dramatiq
from dramatiq.brokers.redis import RedisBroker

from jobstatus_grpc import JobStatusClient
from jobstatus_grpc.contrib.dramatiq import current_job, report

broker = RedisBroker(url=os.environ["TEST_BROKER"], heartbeat_timeout=2000, maintenance_chance=1_000_000)
middleware = report(broker, JobStatusClient(os.environ["TEST_ADDRESS"]), heartbeat_timeout_seconds=1.5)
dramatiq.set_broker(broker)


@dramatiq.actor
def count(total, pause_seconds=0.0):
    for current in range(1, total + 1):
        current_job().progress(100 * current / total, f"row {current}")
        time.sleep(pause_seconds)


@dramatiq.actor(max_retries=1, min_backoff=10, max_backoff=20)
def fail_once():
    if current_job().attempt == 1:
        raise OSError("the disk is away")


@dramatiq.actor(max_retries=1, min_backoff=10, max_backoff=20)
def fail():
    raise ValueError("no paper")


@dramatiq.actor(time_limit=100, min_backoff=10, max_backoff=20)
def take_too_long():
    while True:
        time.sleep(0.01)


@dramatiq.actor
def sleep_once():
    if current_job().attempt == 1:
        time.sleep(60)


@dramatiq.actor(max_age=1)
def be_too_old():
    raise AssertionError
