"""What a server runs on: uvloop where it is installed, else asyncio, and a patient garbage collector."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

COLLECT_AFTER = (20_000, 20, 20)
"""Objects, then collections, between two looks for cycles. Python looks at each 700 objects: a twentieth of a call."""


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` on a new event loop and return what it returns."""
    gc.freeze()  # what is there by now stays
    gc.set_threshold(*COLLECT_AFTER)
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)
