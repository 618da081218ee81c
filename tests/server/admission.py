"""Getting in where only so many may watch."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import grpc

# What a try takes beyond this, the machine stood still.
LONGEST_TRY_SECONDS = 0.1


def within_a_second(is_so: Callable[[], bool]) -> bool:
    """Look again and again; tell whether it became so within a second, which is what a watch may take to be gone."""
    seconds = 0.0
    while seconds < 1:
        began_at = time.monotonic()
        if is_so():
            return True
        seconds += min(time.monotonic() - began_at, LONGEST_TRY_SECONDS)
    return False


def admitted_within_a_second(watch: Callable[[], Any]) -> Any:
    """Open a watch, again and again until it is admitted."""
    admitted = []

    def is_admitted() -> bool:
        stream = watch()
        try:
            next(stream)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
            return False
        admitted.append(stream)
        return True

    assert within_a_second(is_admitted)
    return admitted[0]
