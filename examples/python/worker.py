"""A worker and a watcher of one job. Usage: python worker.py HOST:PORT [SECONDS_PER_STEP]

The client retries calls that are safe to retry, and resumes watches. If a worker only reports its progress and outcome,
`client.track(name)` is shorter: see the README.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

from jobstatus_grpc import JobNotFoundError, JobState, JobStatusClient, StaleAttemptError, Tls


def say(line: str) -> None:
    """Print a line with one write, because two threads print."""
    print(f"{line}\n", end="", flush=True)


def watch(client: JobStatusClient, job_id: str, begun: threading.Event) -> None:
    """Print each new state of a job until it is done."""
    state = None
    try:
        for job in client.watch(job_id):
            if job.state is not state:
                say(f"watch: JOB_STATE_{job.state.name}")
            state = job.state
            begun.set()
    finally:
        begun.set()


def work(client: JobStatusClient, job_id: str, attempt: int, seconds_per_step: float) -> None:
    """Report three steps and the outcome of an attempt; stop if a cancel was requested."""
    end = JobState.SUCCEEDED
    step = 0
    while step < 3 and end is JobState.SUCCEEDED:
        time.sleep(seconds_per_step)  # the work
        step += 1
        job = client.update(job_id, progress=25 * step, attempt=attempt)
        say(f"progress: {job.progress:g}")
        if job.cancel_requested:
            end = JobState.CANCELLED
    job = client.update(job_id, state=end, result={"steps": step}, attempt=attempt)
    say(f"ended: JOB_STATE_{job.state.name}, progress {job.progress:g}")


def security() -> Tls | None:
    """Return TLS, with the CA and the client's certificate and key (PEM) that the environment names."""
    ca, cert, key = (os.environ.get(f"JOBSTATUS_{name}") for name in ("CA", "CERT", "KEY"))
    return Tls(ca_file=ca, cert_file=cert, key_file=key) if ca else None


def main(address: str, seconds_per_step: float = 0.1) -> None:
    token = os.environ.get("JOBSTATUS_TOKEN")
    with ThreadPoolExecutor() as threads, JobStatusClient(address, tls=security(), token=token) as client:
        # The request_id makes a retry safe: the job is created once.
        request_id = str(uuid.uuid4())
        created = client.create("import customers", heartbeat_timeout_seconds=60, request_id=request_id)
        say(f"job: {created.id}")
        say(f"created: JOB_STATE_{created.state.name}")
        again = client.create("import customers", heartbeat_timeout_seconds=60, request_id=request_id)
        assert again.id == created.id
        say("created again: the same job")

        # A claim names the attempt that it starts. Later updates name that attempt, so a stale worker cannot write.
        claimed = client.update(created.id, state=JobState.IN_PROGRESS, attempt=1)
        say(f"claimed: JOB_STATE_{claimed.state.name}, attempt {claimed.attempt}")

        begun = threading.Event()
        watching = threads.submit(watch, client, created.id, begun)
        begun.wait()

        # Of two claims of one attempt, only the first succeeds. This is the second.
        try:
            client.update(created.id, state=JobState.IN_PROGRESS, attempt=1)
            sys.exit("the second claim succeeded")
        except StaleAttemptError as error:
            say(f"second claim: {error.reason}")

        work(client, created.id, claimed.attempt, seconds_per_step)
        watching.result()  # raises the error of the watch, if any

        try:
            client.get("no-such-job")
            sys.exit("an unknown job was found")
        except JobNotFoundError as error:
            say(f"unknown job: {error.reason}")


if __name__ == "__main__":
    main(sys.argv[1], *map(float, sys.argv[2:]))
