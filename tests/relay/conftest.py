"""A server, a receiver and relays for the tests of `jobstatus relay`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.postgres import VERSIONS, PostgresCluster
from tests.support.receiver import Receiver, RelayProcess
from tests.support.service import Service


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """A receiver that answers with 204 unless its `answer` is set."""
    with Receiver() as receiver:
        yield receiver


@pytest.fixture
def group(new_id: Callable[[], str]) -> dict[str, str]:
    """A label that the jobs of one test share."""
    return {"group": new_id()}


@pytest.fixture
def make(service: Service, new_id: Callable[[], str], group: dict[str, str]) -> Callable[..., Any]:
    """Create a job of the test's group, in any state."""

    def make(state: str = "SUCCEEDED", **fields: Any) -> Any:
        return service.job_in(state, id=new_id(), **{"labels": group, **fields})

    return make


@pytest.fixture
def relaying(service: Service, tmp_path: Path, group: dict[str, str]) -> Iterator[Callable[..., RelayProcess]]:
    """Start relays for the jobs of the test's group, one in each folder."""
    with contextlib.ExitStack() as stack:

        def start(*flags: str, folder: Path = tmp_path, **variables: str) -> RelayProcess:
            label = f"group={group['group']}"
            relay = RelayProcess(service.address, folder, "--label", label, *flags, **variables)
            return stack.enter_context(relay)

        yield start


@pytest.fixture
def place_url(postgres_shared: Callable[[int], PostgresCluster]) -> Iterator[str]:
    """The address of an empty database for the places of relays."""
    cluster = postgres_shared(next(iter(VERSIONS)))
    name = cluster.create_database()
    yield cluster.url(name)
    cluster.drop_database(name)


@pytest.fixture
def refused(service: Service, tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Start a relay that must refuse to run; return its exit code and what it printed."""

    def run(*flags: str, **variables: str) -> tuple[int, str]:
        done = RelayProcess(service.address, tmp_path, *flags, **variables).run()
        return done.returncode, done.stdout + done.stderr

    return run
