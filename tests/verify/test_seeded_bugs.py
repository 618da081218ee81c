"""Each seeded bug of faulty_server.py turns the verification red. The table says which check or rule sees it."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys

import pytest
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.client.endpoint import endpoint
from jobstatus_grpc.verify import checker
from jobstatus_grpc.verify.recorder import Recorder
from tests.support import fault_report
from tests.support.servers import ServerProcess
from tests.verify.faulty_server import BUGS

SEEN_BY = {
    "acknowledge-before-commit": {"acknowledged-writes-last", "a-read-returns-the-latest-write"},
    "read-before-register": {"watches-get-the-newest"},
    "no-guard-on-final-states": {"a-done-job-never-changes"},
    "nan-accepted": {"invalid-progress-is-refused"},
    "slow-reader-dropped-silently": {"watches-get-the-newest"},
    "lock-across-a-write": {"watches-get-the-newest"},
    "request-id-outside-the-transaction": {"simultaneous-repeats-take-effect-once"},
    "request-id-remembers-16": {"an-old-request-takes-effect-once", "a-request-id-has-one-effect"},
    "stale-attempt-accepted": {"a-replaced-worker-cannot-write", "an-attempt-has-one-owner"},
    "feed-by-last-id": {"watches-of-many-jobs-are-complete"},
    "stale-replica-read": {"acknowledged-writes-last", "a-read-returns-the-latest-write"},
    "heartbeat-raises-a-revision": {"a-heartbeat-changes-nothing", "revisions-are-contiguous"},
    "ok-without-the-end": {"watches-end-with-the-job"},
    "resume-that-skips-a-removal": {"a-job-that-stops-matching-is-removed", "watches-of-many-jobs-are-complete"},
    "deletion-that-swallows-the-end": {"a-watch-gets-the-end-of-a-job-that-is-deleted"},
    "token-of-another-history-accepted": {"watches-of-many-jobs-are-complete"},
    "page-cursor-that-skips-on-insert": {"a-list-is-complete-in-pages"},
    "cancel-lost-at-the-next-update": {"a-running-job-is-asked-to-stop"},
    "heartbeat-that-does-not-count": {"a-heartbeat-keeps-a-job-from-stalling"},
    "removal-from-a-filter-not-sent": {"a-job-whose-labels-change-leaves"},
    "label-index-of-the-creation": {"lists-are-complete"},
    "history-with-one-entry-a-commit": {"the-history-has-each-transition-of-a-batch"},
    "last-change-within-the-interval-dropped": {"the-last-progress-is-sent"},
    "token-that-passes-a-change-held-back": {"a-token-passes-no-change-that-is-held-back"},
    "token-of-a-list-from-after-it": {"watches-of-many-jobs-are-complete"},
    "batch-in-reverse": {"updates-of-a-batch-are-independent"},
    "deletion-without-its-revision": {"a-deletion-compares-the-revision"},
    "children-that-are-removed-still-counted": {"children-are-counted"},
    "numbers-of-children-not-sent": {"watches-of-many-jobs-are-complete"},
    "resume-without-synced": {"watches-of-many-jobs-are-complete"},
}
"""The check or rule that sees the bug in each run; others may see it too."""

OWN_TEST = "token-of-another-history-accepted"
"""Needs a store that is set back."""


SEEDS = (1, 2, 3)

RULES = {checker.name_of(rule) for rule in checker.RULES}


@pytest.fixture
def record_bug(request):
    """Add a row to docs/reliability.md, with --fault-report."""

    def record(bug, seen):
        fault_report.append(request.config, {"test": request.node.nodeid, "bug": bug, "seen_by": sorted(seen)})

    return record


def faulty(bug, **settings):
    return ServerProcess("--transport", "grpcio", program=("-m", "tests.verify.faulty_server", bug), **settings)


def verified(address, seed, *, seconds=3):
    """Run `jobstatus verify`; return its exit code, and the names of the checks and rules that found something."""
    command = [sys.executable, "-m", "jobstatus_grpc", "verify", "--address", address, "--json"]
    command += ["--duration", f"{seconds}s", "--patience", "1s", "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = json.loads(done.stdout)
    checks = {check["name"] for check in found["checks"] if check["problem"]}
    return done.returncode, checks | {violation["rule"] for violation in found["violations"]}


def test_every_bug_is_tested():
    assert set(SEEN_BY) == set(BUGS)
    assert len(BUGS) >= 16


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("bug", sorted(set(BUGS) - {OWN_TEST}))
def test_a_seeded_bug_is_seen(bug, tmp_path, monkeypatch, record_bug):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", sys.path[0])
    seen = set()
    # A check needs no random load.
    seconds = 2 if SEEN_BY[bug] & RULES else 1
    with faulty(bug) as server:
        for number, seed in enumerate(SEEDS):
            # On a busy machine the load needs longer, for example to fill the buffers of watches that are not read.
            code, found = verified(server.address, seed, seconds=seconds << number)
            assert code == bool(found)
            seen |= found
            if SEEN_BY[bug] <= seen:
                break
    assert SEEN_BY[bug] <= seen
    record_bug(bug, seen)


@pytest.mark.slow
def test_a_server_without_a_bug_passes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ServerProcess(store=f"sqlite:///{tmp_path}/jobs.db") as server:
        assert verified(server.address, 1) == (0, set())


@pytest.mark.slow
@pytest.mark.parametrize("is_faulty", [True, False])
def test_a_token_of_another_history_is_seen(is_faulty, tmp_path, record_bug):
    store = f"sqlite:///{tmp_path}/jobs.db"
    with faulty(OWN_TEST, store=store) if is_faulty else ServerProcess(store=store) as server:
        violations = asyncio.run(asyncio.wait_for(restored(server, tmp_path), 60))
    assert {violation.rule for violation in violations} == (SEEN_BY[OWN_TEST] if is_faulty else set())
    if is_faulty:
        record_bug(OWN_TEST, SEEN_BY[OWN_TEST])


async def restored(server, folder):
    """Set the store back under a client of WatchJobs, which then resumes; return the violations that it sees."""
    kept, lost = [[pb.JobStatus(id=f"{name}-{number}", name=name) for number in range(3)] for name in ("kept", "lost")]
    async with Recorder([endpoint(server.address)], timeout_seconds=10) as recorder:
        await asyncio.to_thread(set_back, server, folder)
        for job in lost:
            await recorder.call("CreateJob", pb.CreateJobRequest(job=job))
        # A restored backup loses acknowledged writes by its nature: they are not judged.
        recorder.entries.clear()
        token = (await watched(recorder, "", 1)).responses[-1][1].resume_token
        await asyncio.to_thread(set_back, server, folder)
        for job in kept:
            await recorder.call("CreateJob", pb.CreateJobRequest(job=job))
        await watched(recorder, token, 2)
    return checker.check(recorder.entries, patience_seconds=0.5)


def set_back(server, folder):
    """Restart on an empty copy of the store, made at the first call."""
    server.terminate()
    database, backup = folder / "jobs.db", folder / "backup.db"
    shutil.copy(*((backup, database) if backup.exists() else (database, backup)))
    server.restart()


async def watched(recorder, token, seconds):
    request = pb.WatchJobsRequest(filter=pb.JobFilter(names=["kept"]), resume_token=token)
    async with recorder.watch("WatchJobs", request) as stream:
        await asyncio.sleep(seconds)
    return stream.entry
