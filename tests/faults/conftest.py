"""How long the fault tests run, and on which versions of PostgreSQL."""

from __future__ import annotations

import pytest

from tests.support.postgres import VERSIONS


@pytest.fixture
def is_full(pytestconfig: pytest.Config) -> bool:
    """Whether the tests run at full length."""
    return bool(pytestconfig.getoption("--full"))


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run on one version of PostgreSQL, at full length on each."""
    versions = list(VERSIONS) if metafunc.config.getoption("--full") else [min(VERSIONS)]
    for fixture in ("postgres", "new_postgres"):
        if fixture in metafunc.fixturenames:
            metafunc.definition.add_marker(pytest.mark.parametrize(fixture, versions, indirect=True))
