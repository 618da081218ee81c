"""The Celery app of the tests: its worker is a process of its own, with a pool that forks."""

# mypy: disable-error-code="union-attr"

from __future__ import annotations

import os
import time

from celery import Celery, chain, group
from celery.exceptions import Ignore, Reject
from kombu.exceptions import EncodeError

from jobstatus_grpc import JobStatusClient
from jobstatus_grpc.contrib.celery import JobStatusReporter, current_job

BROKER = os.environ["TEST_BROKER"]
app = Celery("tests.contrib.celery_app", broker=BROKER, backend=BROKER)
app.conf.update(broker_connection_retry_on_startup=True, worker_prefetch_multiplier=1)
reporter = JobStatusReporter(
    app, JobStatusClient(os.environ["TEST_ADDRESS"]), heartbeat_timeout_seconds=1.5, revoke_on_cancel=True
)


@app.task(bind=True)
def count(self, total, pause_seconds=0.0):
    for current in range(1, total + 1):
        self.update_state(state="PROGRESS", meta={"current": current, "total": total, "status": f"row {current}"})
        time.sleep(pause_seconds)
    return total


@app.task
def add(x, y):
    return x + y


@app.task
def total(numbers):
    return sum(numbers)


@app.task
def fail(message):
    raise ValueError(message)


@app.task(bind=True, max_retries=1)
def fail_once(self):
    if self.request.retries == 0:
        raise self.retry(exc=OSError("the disk is away"), countdown=0)


@app.task(bind=True)
def replace(self, by="task"):
    replacements = {
        "task": add.s(1, 2),
        "chain": chain(add.s(1, 2), add.s(3)),
        "group": group(add.s(1, 2), add.s(3, 4)),
        "failure": fail.s("no paper"),
        "nothing": chain(),
    }
    return self.replace(replacements[by])


@app.task(bind=True)
def replace_or_go_on(self):
    try:
        return self.replace(add.s(object(), 2))  # which JSON cannot have
    except EncodeError:
        return 3


@app.task
def ignore():
    raise Ignore("not on Sundays")


@app.task(acks_late=True)
def reject_once():
    if current_job().attempt == 1:
        raise Reject("not here", requeue=True)


@app.task(acks_late=True, reject_on_worker_lost=True)
def sleep_once():
    current_job().result = {"pid": os.getpid()}
    current_job().progress(50, f"pid {os.getpid()}")
    if current_job().attempt == 1:
        time.sleep(60)


@app.task
def sleep():
    current_job().progress(50, f"pid {os.getpid()}")
    time.sleep(60)
