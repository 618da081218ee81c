"""Event loops for tests: each runs one coroutine to its end."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")

RUN_SECONDS = 20.0
"""How long a scenario may take: below the timeout of a test, so that its failure shows where it hangs."""


def run(scenario: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
    """Run a coroutine function on a new loop, for at most RUN_SECONDS."""
    return asyncio.run(asyncio.wait_for(scenario(), RUN_SECONDS))


def on_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an asynchronous test on a new loop."""

    @functools.wraps(test)
    def run_test(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return run_test
