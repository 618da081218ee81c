"""A page of a list as bytes, beside other work of the event loop."""

from __future__ import annotations

import asyncio

from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.job import JobState
from jobstatus_grpc.server.requests import Caller, to_jobs_query
from jobstatus_grpc.server.responses import JOBS_PER_TURN, jobs_reply
from jobstatus_grpc.stores.interface import Page
from tests.jobs import job_in

JOBS = 500
PAGE = Page([job_in(JobState.PENDING)] * JOBS, [f"{number}.1" for number in range(JOBS)], "")


def test_others_get_their_turns_while_a_large_page_is_rendered():
    async def main() -> int:
        query = to_jobs_query(pb.ListJobsRequest(), Caller(actor="me"))
        rendering = asyncio.create_task(jobs_reply(query, "1", PAGE))
        turns = 0
        while not rendering.done():
            await asyncio.sleep(0)
            turns += 1
        assert len(pb.ListJobsResponse.FromString(rendering.result()).jobs) == JOBS
        return turns

    assert asyncio.run(main()) >= JOBS // JOBS_PER_TURN
