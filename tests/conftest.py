"""Fixtures that tests of several packages share: servers, calls on them, and PostgreSQL clusters."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from jobstatus.v1 import job_status_pb2 as pb

from tests.support import fault_report
from tests.support.auth import AuthText
from tests.support.postgres import VERSIONS, PostgresCluster, PostgresHome
from tests.support.servers import ServerProcess
from tests.support.service import Refusal, Service, read_refusal, update_of

FIRST, *OTHERS = VERSIONS
EACH_VERSION = [FIRST, *(pytest.param(version, marks=pytest.mark.slow) for version in OTHERS)]

_numbers = itertools.count(1)

# Of containers often, and it hides what is left unwritten in a stream when a process ends.
os.environ.pop("PYTHONUNBUFFERED", None)


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Restore the level and handlers of all loggers, which a server sets that runs in the process of a test."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="the fault tests at full length")
    parser.addoption(
        "--soak", metavar="MINUTES", type=int, default=1, help="with --full: how long faults are caused at random"
    )
    parser.addoption(
        "--built", metavar="FOLDER", type=Path, help="test the sdist and wheel in this folder instead of building them"
    )
    parser.addoption(
        "--fault-report", metavar="FILE", help="append what the fault tests did to this file, as JSON lines"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Record a failure for --fault-report: what an earlier run of the test has recorded is void."""
    report = yield
    if report.failed:
        fault_report.append(item.config, {"test": item.nodeid, "failed": True})
    return report


@pytest.fixture
def record_fault(pytestconfig: pytest.Config, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Add a row to docs/reliability.md, with --fault-report; called at the end of a test that has passed.

    The transport and the version of PostgreSQL that the test is run with are appended to the name of the fault.

    record_fault("kill -9 of the server under load", count=150, checked="52,310 writes", result="none lost")
    """

    def record(fault: str, *, count: int, checked: str, result: str) -> None:
        parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
        if transport := parameters.get("transport"):
            fault += f", on {transport}"
        if version := parameters.get("postgres") or parameters.get("new_postgres"):
            fault += f", PostgreSQL {version}"
        row = {"test": request.node.nodeid, "fault": fault, "count": count, "checked": checked, "result": result}
        fault_report.append(pytestconfig, row)

    return record


@pytest.fixture(name="update_of")
def _update_of() -> Callable[..., pb.UpdateJobRequest]:
    return update_of


@pytest.fixture
def auth(tmp_path: Path) -> AuthText:
    """A file for --auth, without callers yet."""
    return AuthText(tmp_path / "auth.toml")


@pytest.fixture
def refused() -> Callable[..., Refusal]:
    """Make a call that must be refused, and return how."""

    def refusal_of(call: Callable[..., Any], *args: Any, **fields: Any) -> Refusal:
        with pytest.raises(grpc.RpcError) as caught:
            call(*args, **fields)
        return read_refusal(caught.value)

    return refusal_of


@pytest.fixture
def refusal() -> Callable[[Any], Refusal]:
    """Read an error that has been caught."""
    return read_refusal


@pytest.fixture
def new_id(request: pytest.FixtureRequest) -> Callable[[], str]:
    """Make ids that no other test uses."""
    return lambda: f"job-{next(_numbers)}"


@pytest.fixture(scope="session")
def memory_service() -> Iterator[Service]:
    with ServerProcess() as process:
        service = Service(process.address, process)
        yield service
        service.close()


@pytest.fixture(scope="session")
def sqlite_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with ServerProcess(store=f"sqlite:///{tmp_path_factory.mktemp('store')}/jobs.db") as process:
        service = Service(process.address, process)
        yield service
        service.close()


@pytest.fixture
def service(memory_service: Service) -> Service:
    """A server that all tests share, with a store in memory."""
    return memory_service


@pytest.fixture(params=["memory", "sqlite"])
def any_service(request: pytest.FixtureRequest) -> Service:
    """A server that all tests share, on each store."""
    service: Service = request.getfixturevalue(f"{request.param}_service")
    return service


def serving() -> Iterator[Callable[..., Service]]:
    """Start servers; `service.process` is a server's process."""
    services: list[Service] = []

    def start(*flags: str, **settings: Any) -> Service:
        process = ServerProcess(*flags, **settings)
        process.start()
        services.append(Service(process.address, process))
        return services[-1]

    yield start
    for service in services:
        service.close()
        assert service.process is not None
        service.process.kill()


@pytest.fixture
def serve() -> Iterator[Callable[..., Service]]:
    """Start servers of this test's own."""
    yield from serving()


@pytest.fixture(scope="module")
def serve_module() -> Iterator[Callable[..., Service]]:
    """Start servers for all tests of a file."""
    yield from serving()


@pytest.fixture(scope="session")
def postgres_home() -> Iterator[PostgresHome]:
    home = PostgresHome()
    yield home
    home.close()


@pytest.fixture(scope="session")
def postgres_shared(postgres_home: PostgresHome) -> Iterator[Callable[[int], PostgresCluster]]:
    """Return the cluster of a version; the first call makes it."""
    clusters: dict[int, PostgresCluster] = {}
    with contextlib.ExitStack() as stack:

        def shared(version: int) -> PostgresCluster:
            if version not in clusters:
                clusters[version] = stack.enter_context(PostgresCluster(version, postgres_home))
            return clusters[version]

        yield shared


@contextlib.contextmanager
def log_shown(cluster: PostgresCluster) -> Iterator[None]:
    """Print what the cluster logs during the block; pytest shows it if the test fails."""
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
