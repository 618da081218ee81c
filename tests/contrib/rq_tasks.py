"""What RQ's worker runs in the tests, and the class of its jobs."""

# mypy: disable-error-code="union-attr"

from __future__ import annotations

import os
import time

from rq import Retry, get_current_job

from jobstatus_grpc import JobStatusClient
from jobstatus_grpc.contrib.rq import current_job, job_class

ReportedJob = job_class(JobStatusClient(os.environ["TEST_ADDRESS"]), heartbeat_timeout_seconds=1.5)


def count(total, pause_seconds=0.0):
    job = get_current_job()
    for current in range(1, total + 1):
        job.meta.update(current=current, total=total, status=f"row {current}")
        job.save_meta()
        time.sleep(pause_seconds)


def fail_once():
    if current_job().attempt == 1:
        raise OSError("the disk is away")


def return_retry(times):
    return Retry(max=1) if current_job().attempt <= times else "done"


def succeed():
    return "done"


def fail_in_callback(*_):
    raise OSError("the disk is away")


def sleep():
    current_job().progress(50, f"pid {os.getpid()}")
    time.sleep(60)
