"""How long the fault tests run, and on which versions of PostgreSQL."""

from __future__ import annotations

import pytest

from tests.support.postgres import VERSIONS


@pytest.fixture
def is_full(pytestconfig: pytest.Config) -> bool:
    """Whether the tests run at full length."""
    return bool(pytestconfig.getoption("--full"))


@pytest.fixture
def patience_seconds(is_full: bool) -> float:
    """Time within which a change must reach its watchers: at full length, also on a busy machine."""
    return 10.0 if is_full else 3.0


@pytest.fixture(params=["grpcio", "native"])
def transport(request: pytest.FixtureRequest) -> str:
    """Each transport of the server."""
    if request.param == "native":
        pytest.importorskip("pygrpc_native", reason="pygrpc-native is not built for this Python")
    return str(request.param)


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run on one version of PostgreSQL, at full length on each."""
    versions = list(VERSIONS) if metafunc.config.getoption("--full") else [min(VERSIONS)]
    for fixture in ("postgres", "new_postgres"):
        if fixture in metafunc.fixturenames:
            metafunc.definition.add_marker(pytest.mark.parametrize(fixture, versions, indirect=True))
