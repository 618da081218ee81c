"""The server's event loop: uvloop's where it is installed."""

from __future__ import annotations

import asyncio
import gc
import sys

import pytest

from jobstatus_grpc.server import app


@pytest.fixture(autouse=True)
def _collector():
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


async def module_of_the_loop():
    return type(asyncio.get_running_loop()).__module__


def test_the_server_runs_on_uvloop_where_it_is_installed():
    pytest.importorskip("uvloop")
    assert app.run_loop(module_of_the_loop()).startswith("uvloop")


def test_without_uvloop_it_runs_on_asyncio(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert app.run_loop(module_of_the_loop()).startswith("asyncio")


def test_cycles_are_looked_for_seldom():
    app.run_loop(module_of_the_loop())
    assert gc.get_threshold() == app.COLLECT_AFTER
