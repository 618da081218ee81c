"""How long the fault tests run."""

from __future__ import annotations

import pytest


@pytest.fixture
def is_full(pytestconfig: pytest.Config) -> bool:
    """Whether the tests run at full length."""
    return bool(pytestconfig.getoption("--full"))
