"""Jobs that the tests of one service share a filter for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from jobstatus.v1 import job_status_pb2 as pb

from tests.support.service import Service


@pytest.fixture
def group(new_id: Callable[[], str]) -> dict[str, str]:
    """A label that the jobs of one test share."""
    return {"group": new_id()}


@pytest.fixture
def make(any_service: Service, new_id: Callable[[], str], group: dict[str, str]) -> Callable[..., pb.JobStatus]:
    """Create a job of the test's group, in any state."""

    def make(state: str = "IN_PROGRESS", **fields: Any) -> pb.JobStatus:
        return any_service.job_in(state, id=new_id(), **{"labels": group, **fields})

    return make
