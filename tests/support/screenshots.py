"""Makes the pictures of the board in docs/: `make screenshots`. Look at them before you commit them."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import grpc
from google.protobuf import duration_pb2, timestamp_pb2
from jobstatus.v1 import job_status_pb2 as pb
from jobstatus.v1.job_status_pb2_grpc import JobStatusServiceStub
from playwright.sync_api import Page, expect, sync_playwright

from tests.support.servers import ServerProcess

FOLDER = Path(__file__).parents[2] / "docs"

STALLED_AFTER = duration_pb2.Duration(seconds=1)

CREATED = [
    pb.JobStatus(id="backup-11-27", name="nightly backup", labels={"team": "ops"}),
    pb.JobStatus(id="report-2026-10", name="monthly report", labels={"team": "finance"}),
    pb.JobStatus(id="video-8812", name="transcode lecture.mov", labels={"team": "media", "region": "eu"}),
    pb.JobStatus(id="import-442", name="import of customers", labels={"team": "core"}),
    *(pb.JobStatus(id=f"import-442.{n}", name=f"import, part {n}", parent_id="import-442") for n in range(1, 4)),
    pb.JobStatus(id="mail-77", name="newsletter", labels={"team": "media"}),
    pb.JobStatus(id="index-9", name="rebuild of the index", labels={"team": "core"}, heartbeat_timeout=STALLED_AFTER),
]

REPORTED = [
    pb.JobStatus(id="backup-11-27", state=pb.JOB_STATE_SUCCEEDED, reason="1.2 GB written"),
    pb.JobStatus(
        id="report-2026-10",
        state=pb.JOB_STATE_FAILED,
        error=pb.JobError(code=14, message="the warehouse refused the connection", reason="WAREHOUSE_DOWN"),
    ),
    pb.JobStatus(id="video-8812", state=pb.JOB_STATE_IN_PROGRESS, progress=12.5, reason="pass 1 of 2"),
    pb.JobStatus(
        id="import-442",
        state=pb.JOB_STATE_IN_PROGRESS,
        progress=64,
        reason="page 17 of 26",
        estimated_completion=timestamp_pb2.Timestamp(seconds=int(time.time()) + 12 * 60),
    ),
    pb.JobStatus(id="import-442.1", state=pb.JOB_STATE_SUCCEEDED),
    pb.JobStatus(id="import-442.2", state=pb.JOB_STATE_IN_PROGRESS, progress=40),
    pb.JobStatus(id="index-9", state=pb.JOB_STATE_IN_PROGRESS, progress=80),
]


def main() -> None:
    """Serve some jobs, and take a picture of the list and of a job in both colour schemes."""
    with ServerProcess("--http", "127.0.0.1:0") as server, grpc.insecure_channel(server.address) as channel:
        stub = JobStatusServiceStub(channel)
        for job in CREATED:
            stub.CreateJob(pb.CreateJobRequest(job=job))
        for job in REPORTED:
            stub.UpdateJob(pb.UpdateJobRequest(job=job))
        stub.CancelJob(pb.CancelJobRequest(id="video-8812", reason="wrong file"))
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            for scheme, place, name in (("light", "", "board"), ("dark", "?job=import-442", "board-job")):
                page = browser.new_page(viewport={"width": 1200, "height": 720}, color_scheme=scheme)  # type: ignore[arg-type]
                page.goto(f"{server.http}/{place}")
                _wait(page)
                if not place:
                    expect(page.locator(".mark.stalled")).to_be_visible()
                page.screenshot(path=FOLDER / f"{name}.png", full_page=True)
            browser.close()


def _wait(page: Page) -> None:
    expect(page.locator("#connection")).to_have_text("live")
    expect(page.locator("#rows tr, #children li").first).to_be_visible()


if __name__ == "__main__":
    main()
