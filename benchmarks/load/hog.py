"""A caller that takes as much as it gets: it calls again as soon as a call has ended, also if that was refused.

A process of its own, so that the calls measured beside it do not wait for it: `python -m benchmarks.load.hog`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from subprocess import PIPE, Popen

from benchmarks.load.apis import JobsApi
from benchmarks.load.client import Client, shared_out

CONNECTIONS = 16
SETTLE_SECONDS = 1.0


class Hog:
    """The process, for the time of `hog`."""

    def __init__(self, process: Popen[str]) -> None:
        self._process = process

    def wait(self) -> tuple[float, float]:
        """Wait for its end, and return how many calls a second were answered, and how many were refused."""
        out, _ = self._process.communicate()
        answered, refused = json.loads(out)
        return answered, refused


@contextmanager
def hog(address: str, job_ids: list[str], *, callers: int, seconds: float, token: str = "") -> Iterator[Hog]:
    """Update these jobs with this number of calls in flight, for `seconds` from now and SETTLE_SECONDS before."""
    command = [sys.executable, "-m", "benchmarks.load.hog", address, str(callers), str(seconds), token]
    with Popen(command, stdin=PIPE, stdout=PIPE, text=True) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(job_ids) + "\n")
            process.stdin.flush()
            process.stdout.readline()
            yield Hog(process)
        finally:
            process.kill()


def main(address: str, callers: str, seconds: str, token: str) -> None:
    """Run until the time is over, and print what was answered and refused a second."""
    job_ids, api = json.loads(sys.stdin.readline()), JobsApi()
    requests = [api.updates([job_id]) for job_id in job_ids]
    lanes = list(shared_out(requests * -(-int(callers) // len(requests)), int(callers)))
    with Client(address, connections=CONNECTIONS, token=token) as client:
        load = client.load(api.update, lanes, may_fail=True).__enter__()  # its end would wait for calls in flight
        load.measure(SETTLE_SECONDS)
        print(flush=True)
        answered = len(load.measure(float(seconds)))
        print(json.dumps([answered / float(seconds), load.failures / float(seconds)]), flush=True)
        os._exit(0)  # with calls in flight, as a caller that crashes


if __name__ == "__main__":
    main(*sys.argv[1:])
