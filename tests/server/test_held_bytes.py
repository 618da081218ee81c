"""The memory counted for open calls: what one caller gets, and what a write may exceed."""

from __future__ import annotations

import psutil
import pytest

from jobstatus_grpc.errors import TooManyRequestsError
from jobstatus_grpc.job.limits import MAX_REQUEST_BYTES
from jobstatus_grpc.server.config import MIN_HELD_MIB
from jobstatus_grpc.server.held_bytes import MIB, REQUEST_FACTOR, HeldBytes, OpenCall, default_limit


def call_of(caller):
    return OpenCall(caller, TooManyRequestsError)


def test_one_caller_leaves_memory_to_the_next():
    held = HeldBytes(9 * MIB)
    first, second = call_of("a"), call_of("b")
    held.add(first, 8 * MIB)
    with pytest.raises(TooManyRequestsError):
        held.add(call_of("a"), 1000)
    held.add(second, MIB // 2)
    assert (held.total, held.refusals) == (8 * MIB + MIB // 2, 1)


def test_the_largest_request_fits_the_least_limit():
    HeldBytes(MIN_HELD_MIB * MIB).add(call_of("a"), REQUEST_FACTOR * MAX_REQUEST_BYTES)


def test_what_a_call_held_is_free_again_when_it_ends():
    held, call = HeldBytes(MIB), call_of("a")
    held.add(call, 1000)
    held.add(call, -400)
    assert held.total == call.held_bytes == 600
    held.free(call)
    held.free(call)
    assert held.total == 0


def test_the_response_to_a_write_is_counted_but_not_refused():
    held, call = HeldBytes(MIB), call_of("a")
    held.add(call, 2 * MIB, is_refusable=False)
    with pytest.raises(TooManyRequestsError):
        held.add(call_of("b"), 1)
    held.free(call)
    held.add(call_of("b"), 1)


@pytest.mark.parametrize("workers", [1, 4])
def test_without_a_setting_all_workers_together_get_half_of_the_memory(workers):
    half = psutil.virtual_memory().total // 2
    assert MIN_HELD_MIB * MIB <= default_limit(workers) <= max(half // workers, MIN_HELD_MIB * MIB)
