"""A broker, and a client of the server that all tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from jobstatus_grpc import JobStatusClient
from tests.support.redis import redis_socket
from tests.support.service import Service


@pytest.fixture(scope="module")
def redis() -> Iterator[Path]:
    """The socket of a Redis."""
    yield from redis_socket()


@pytest.fixture(scope="module")
def client(memory_service: Service) -> Iterator[JobStatusClient]:
    with JobStatusClient(memory_service.address) as client:
        yield client
