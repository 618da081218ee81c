"""Something that changes jobs all the time, in every way that watchers of many must hear of."""

from __future__ import annotations

import random

from jobstatus.v1 import job_status_pb2 as pb

JOBS = 15


class Writer:
    """Does to its own jobs, one after the other, what comes to its mind."""

    def __init__(self, stub, number, seed):
        self._stub = stub
        self._chance = random.Random(seed)
        self._jobs: dict[str, bool] = {}
        self._number = number
        self._created = 0
        self.deleted = 0

    async def run(self):
        while True:
            await self.step()

    async def step(self):
        chance = self._chance
        if len(self._jobs) < JOBS:
            return await self._create()
        job_id = chance.choice(list(self._jobs))
        if self._jobs[job_id]:
            del self._jobs[job_id]
            self.deleted += 1
            return await self._stub.DeleteJob(pb.DeleteJobRequest(id=job_id))
        job = pb.JobStatus(id=job_id)
        kind = chance.randrange(10)
        if kind == 0:
            job.state = pb.JOB_STATE_SUCCEEDED
            self._jobs[job_id] = True
        elif kind < 4:
            job.labels["color"] = chance.choice(["red", "green", "blue"])
        else:
            job.progress = chance.uniform(0, 100)
            job.reason = str(chance.random())
        return await self._stub.UpdateJob(pb.UpdateJobRequest(job=job))

    async def _create(self):
        self._created += 1
        job = pb.JobStatus(id=f"job-{self._number}-{self._created}", labels={"color": "red"})
        job.name = self._chance.choice(["odd", "even"])
        job.state = self._chance.choice([pb.JOB_STATE_PENDING, pb.JOB_STATE_IN_PROGRESS])
        self._jobs[job.id] = False
        await self._stub.CreateJob(pb.CreateJobRequest(job=job))
