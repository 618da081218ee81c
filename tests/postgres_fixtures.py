"""PostgreSQL for tests: a cluster of each version that all tests of a process share, and clusters of a test's own."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

import pytest

from tests.postgres import VERSIONS, PostgresCluster, PostgresHome

FIRST, *OTHERS = VERSIONS
EACH_VERSION = [FIRST, *(pytest.param(version, marks=pytest.mark.slow) for version in OTHERS)]


@pytest.fixture(scope="session")
def postgres_home() -> Iterator[PostgresHome]:
    home = PostgresHome()
    yield home
    home.close()


@pytest.fixture(scope="session")
def postgres_shared(postgres_home: PostgresHome) -> Iterator[Callable[[int], PostgresCluster]]:
    """Find the cluster of a version, which is made when it is first asked for."""
    clusters: dict[int, PostgresCluster] = {}
    with contextlib.ExitStack() as stack:

        def shared(version: int) -> PostgresCluster:
            if version not in clusters:
                clusters[version] = stack.enter_context(PostgresCluster(version, postgres_home))
            return clusters[version]

        yield shared


@contextlib.contextmanager
def log_shown(cluster: PostgresCluster) -> Iterator[None]:
    """Print what it logs meanwhile; pytest shows that of a test that fails."""
    start = cluster.log.stat().st_size
    try:
        yield
    finally:
        sys.stderr.write(cluster.log.read_text(errors="replace")[start:])


@pytest.fixture(params=EACH_VERSION)
def postgres(
    request: pytest.FixtureRequest, postgres_shared: Callable[[int], PostgresCluster]
) -> Iterator[PostgresCluster]:
    """A shared cluster, of each version; a test that stops, kills or configures one takes `new_postgres`."""
    cluster = postgres_shared(request.param)
    with log_shown(cluster):
        yield cluster


@pytest.fixture
def postgres_url(postgres: PostgresCluster) -> Iterator[str]:
    """The address of an empty database of this test's own."""
    name = postgres.create_database()
    yield postgres.url(name)
    postgres.drop_database(name)


@pytest.fixture(params=EACH_VERSION)
def new_postgres(request: pytest.FixtureRequest, postgres_home: PostgresHome) -> Iterator[PostgresCluster]:
    """A running cluster of this test's own, of each version."""
    with PostgresCluster(request.param, postgres_home) as cluster, log_shown(cluster):
        yield cluster
