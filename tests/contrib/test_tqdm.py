"""tqdm's bars as jobs."""

from __future__ import annotations

import io
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import tqdm as original

from jobstatus_grpc import Job, JobFilter, JobState, JobStatusClient
from jobstatus_grpc import tqdm as reported
from jobstatus_grpc.contrib.futures import TrackedExecutor
from tests.support.service import Service


@pytest.fixture(autouse=True)
def _reported_to(client: JobStatusClient) -> None:
    reported.use(client)


@pytest.fixture
def tqdm() -> Callable[..., object]:
    """Make bars that show nothing."""
    return lambda *args, **kwargs: reported.tqdm(*args, file=io.StringIO(), **kwargs)


@pytest.fixture
def newest(client: JobStatusClient) -> Callable[[str], Job]:
    """The newest job with a name."""
    return lambda name: client.list(JobFilter(names=[name]), page_size=1).jobs[0]


def test_a_bar_is_a_job(tqdm, newest):
    assert list(tqdm(range(10), desc="rows")) == list(range(10))
    job = newest("rows")
    assert (job.state, job.progress, job.reason) == (JobState.SUCCEEDED, 100, "rows 10/10")


def test_a_bar_within_another_is_a_part_of_its_step(tqdm, newest):
    for _ in tqdm(range(2), desc="epochs"):
        for _ in tqdm(range(4), desc="batches", mininterval=0):
            pass
        break
    job = newest("epochs")
    assert (job.state, job.reason) == (JobState.ABORTED, "left at 0 of 2")


def test_steps_of_an_inner_bar_move_the_outer_one(tqdm, newest):
    with tqdm(total=2, desc="epochs", mininterval=0) as epochs, tqdm(total=4, desc="batches", mininterval=0) as batches:
        epochs.update(1)
        batches.update(2)
        while newest("epochs").progress != 75:
            time.sleep(0.05)
        assert newest("epochs").reason == "epochs 1/2, batches 2/4"


def test_a_with_block_that_raises_fails(tqdm, newest):
    with pytest.raises(ValueError, match="no paper"), tqdm(total=2, desc="pages"):
        raise ValueError("no paper")
    assert (newest("pages").state, newest("pages").error.message) == (JobState.FAILED, "no paper")


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("bar = tqdm(total=9, desc='program')\n1 / 0", (JobState.FAILED, "ZeroDivisionError")),
        ("for row in tqdm(range(9), desc='program'): 1 / row", (JobState.ABORTED, "")),
    ],
)
def test_the_end_of_the_program_is_the_end_of_its_bar(service: Service, newest, program, outcome):
    command = [sys.executable, "-c", f"from jobstatus_grpc.tqdm import tqdm\n{program}"]
    subprocess.run(command, env={"JOBSTATUS_ADDRESS": service.address}, capture_output=True, check=False)
    job = newest("program")
    assert (job.state, job.error.reason) == outcome


def test_an_address_that_is_none_is_one_line_for_all_bars():
    program = "from jobstatus_grpc.tqdm import trange\nfor _ in trange(3): list(trange(2))"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env={"JOBSTATUS_ADDRESS": "no address"}, capture_output=True, text=True, check=True)
    assert done.stderr.count("progress bars are not reported: 'no address' is not an address") == 1
    assert "Traceback" not in done.stderr


def test_bars_in_a_task_are_phases_of_its_job(tqdm, client):
    from concurrent.futures import ThreadPoolExecutor

    def work() -> None:
        list(tqdm(range(3), desc="read"))
        list(tqdm(range(3), desc="write"))

    with TrackedExecutor(ThreadPoolExecutor(1), client) as executor:
        future = executor.submit(work)
    job = client.get(executor.job_id(future))
    assert (job.state, job.reason) == (JobState.SUCCEEDED, "write 3/3")


def test_a_disabled_bar_has_no_job(tqdm, client):
    list(tqdm(range(3), desc="disabled", disable=True))
    assert not client.list(JobFilter(names=["disabled"])).jobs


def test_trange_is_a_bar_of_a_range(client):
    with reported.trange(2, 5, file=io.StringIO()) as bar:
        assert list(bar) == [2, 3, 4]


def test_a_reported_bar_takes_at_most_twice_the_time_of_an_original_one():
    def seconds(tqdm) -> float:
        begun_at = time.perf_counter()
        for _ in tqdm(range(500_000), file=io.StringIO()):
            pass
        return time.perf_counter() - begun_at

    pairs = [(seconds(reported.tqdm), seconds(original.tqdm)) for _ in range(7)]
    assert statistics.median(ours / theirs for ours, theirs in pairs) < 2
