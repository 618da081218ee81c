"""The benchmark's own parts, against real servers: its requests to etcd, its load, and its verdicts."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest

from benchmarks import document
from benchmarks.load.apis import path
from benchmarks.load.client import CallFailedError, Client
from benchmarks.report import Figure, Target, growth
from benchmarks.rows import ROWS, postgres
from benchmarks.rows.postgres import POSTGRESQL, SQLITE, STORES, TWO_WORKERS
from benchmarks.rows.watching import END_MARK, Audience
from benchmarks.servers import BARE, BARE_NATIVE, ETCD, GRPCIO, SMALL, Bench, CannotMeasureError, Cores

JOBS = ["job-0", "job-1"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(Cores(), tmp_path_factory.mktemp("benchmarks"), SMALL)


@pytest.fixture(scope="module", params=[ETCD, GRPCIO])
def server(bench, request):
    with bench.run(request.param) as server:
        yield server


@pytest.fixture
def job_id():
    return str(uuid4())


@pytest.fixture
def client(server, job_id):
    with Client(server.address, connections=2) as client:
        server.api.create(client, [job_id])
        yield client


def test_each_update_is_one_change(server, client, job_id):
    updates = server.api.updates([job_id])
    for _ in range(5):
        client.call(server.api.update, updates())
    assert server.api.changes_of(client, [job_id]) == 5


def test_a_read_returns_the_newest_update(server, client, job_id):
    client.call(server.api.update, server.api.marked_request(job_id, "half of it"))
    assert b"half of it" in client.call(server.api.read, server.api.read_request(job_id))


def test_watchers_receive_a_change_and_the_end(server, job_id):
    with Audience(server, [job_id], 20) as audience:
        audience.open(20)
        audience.change("half of it")
        audience.change(END_MARK, is_end=True)
        assert audience.saw_the_end() == 20
        messages = audience.delivered()
    assert (len(messages), sum(map(server.api.changes_in, messages))) == (40, 40)


def test_long_fields_are_read_as_they_were_written(server, client, job_id):
    mark = "b" * 300
    client.call(server.api.update, server.api.marked_request(job_id, mark))
    assert mark.encode() in client.call(server.api.read, server.api.read_request(job_id))


@pytest.mark.parametrize("side", [BARE, BARE_NATIVE])
def test_a_load_counts_the_calls_that_it_made(bench, side):
    with bench.run(side) as server, Client(server.address, connections=2) as client:
        updates = [server.api.updates([job_id]) for job_id in JOBS]
        with client.load(server.api.update, updates) as load:
            calls = len(load.measure(0.5))
    assert 50 < calls <= sum(each.sent for each in updates)


def test_a_load_whose_calls_fail_measures_nothing(bench):
    with (
        bench.run(BARE) as server,
        Client(server.address) as client,
        pytest.raises(CallFailedError),
        client.load(path("DeleteJob"), [lambda: b""]) as load,
    ):
        load.measure(0.2)


@pytest.mark.parametrize(("ours", "verdict"), [(1.2, "0.6 × etcd (≥ 0.5) ok"), (0.9, "0.45 × etcd (≥ 0.5) MISSED")])
def test_a_missed_target_is_marked(ours, verdict):
    values = {GRPCIO: [ours, ours, 9.0], ETCD: [2.0]}
    figure = Figure("calls/s", "get", values, [Target(GRPCIO, "≥", 0.5, ETCD)])
    assert verdict in document.whole([], [figure], None)


def test_targets_of_two_workers_are_in_the_list_of_all():
    figure = Figure("by one", "postgres", {TWO_WORKERS: [1.2]}, [Target(TWO_WORKERS, "≥", 1.5)])
    assert "| by one | 1.2 (≥ 1.5) MISSED |" in document.goals([figure])


def test_the_head_explains_the_columns_that_occur():
    head = document.whole([], [Figure("calls/s", "postgres", {SQLITE: [2], POSTGRESQL: [1]})], None)
    assert [column for column in document.COLUMNS if f"\n| {column} | " in head] == [SQLITE, POSTGRESQL]


@pytest.mark.slow
def test_postgresql_is_measured_beside_sqlite_and_with_two_workers(bench):
    figures = {figure.name: figure for figure in ROWS["postgres"].measure(bench)}
    assert tuple(figures["UpdateJob, calls/s, 64 in flight"].values) == STORES
    for costs in (figures[name] for name in figures if "CPU, µs a call" in name):
        assert min(min(values) for values in costs.values.values()) > 5
    changes = [figures[name] for name in figures if name.endswith("changes per update")]
    assert not [verdict for figure in changes for verdict in figure.verdicts() if verdict.badness > 1]


def test_the_databases_cpu_includes_processes_that_have_ended(bench):
    async def count(url):
        connection = await asyncpg.connect(url)
        await connection.execute("SELECT count(*) FROM generate_series(1, 3000000)")
        await connection.close()

    with postgres.running(bench, 1) as (urls, cpu_seconds):
        before = cpu_seconds()
        asyncio.run(count(urls[0]))
        deadline = time.monotonic() + 20
        while cpu_seconds() < before + 0.05:  # until the server has reaped the connection's process
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_without_the_driver_the_row_of_postgresql_says_what_to_do(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    with pytest.raises(CannotMeasureError, match="asyncpg missing; run make setup"):
        ROWS["postgres"].measure(bench)


def test_without_our_transport_the_row_of_postgresql_measures_nothing(bench):
    assert ROWS["postgres"].measure(replace(bench, sides=[ETCD])) == []


@pytest.mark.parametrize(
    ("last", "word"), [(1.0, "O(1)"), (10.0, "less than"), (100.0, "O(n)"), (1000.0, "MORE"), (0.1, "falls")]
)
def test_growth_is_described_in_a_word(last, word):
    assert growth({1: [1.0], 100: [last]}).startswith(word)


@pytest.mark.parametrize(("flags", "is_written"), [([], False), (["--write"], True)])
def test_one_row_alone_writes_no_document_unless_asked_to(tmp_path, flags, is_written):
    command = [sys.executable, "-m", "benchmarks", "--small", "--only", "finish", "--sides", GRPCIO, *flags]
    paths = {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | paths, capture_output=True, text=True, check=True)
    assert "watchers of 50 that saw the end" in done.stdout
    assert (tmp_path / "BENCHMARKS.md").exists() is is_written
