"""The benchmark's own parts, against real servers: what it says to etcd, its load, and how it judges."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest

from benchmarks import database, document, messages
from benchmarks.audience import Audience
from benchmarks.beside import ready_replies
from benchmarks.client import CallFailedError, Client, path
from benchmarks.etcd import field, fields
from benchmarks.load import Load
from benchmarks.machine import Cores
from benchmarks.plan import SMALL
from benchmarks.report import Figure, Target, growth
from benchmarks.rows import ROWS
from benchmarks.servers import (
    BARE,
    BARE_NATIVE,
    ETCD,
    GRPCIO,
    POSTGRESQL,
    SQLITE,
    STORES,
    TWO_WORKERS,
    CannotMeasureError,
    Workplace,
)

JOBS = ["job-0", "job-1"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return Workplace(Cores(None, None), tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture(scope="module", params=[ETCD, GRPCIO])
def server(workplace, request):
    with workplace.run(request.param) as server:
        yield server


@pytest.fixture
def job_id():
    return str(uuid4())


@pytest.fixture
def client(server, job_id):
    with Client(server.address, connections=2) as client:
        server.api.prepare(client, [job_id])
        yield client


def test_each_update_is_one_change(server, client, job_id):
    updates = server.api.updates([job_id])
    for _ in range(5):
        client.call(server.api.update, updates())
    assert server.api.changes_of(client, [job_id]) == 5


def test_a_read_tells_the_newest_update(server, client, job_id):
    client.call(server.api.update, server.api.marked_request(job_id, "half of it"))
    assert b"half of it" in client.call(server.api.read, server.api.read_request(job_id))


def test_watchers_are_told_of_a_change_and_the_end(server, client, job_id):
    audience = Audience(client, server.api, job_id)
    audience.open(20)
    audience.change("half of it")
    audience.change("the end of it", is_end=True)
    audience.wait_for_ends()
    assert (audience.saw_the_end, audience.delivered, audience.changes_told) == (20, 40, 40)


def test_long_fields_are_read_as_they_were_written():
    assert list(fields(field(1, b"a") + field(200, b"b" * 300) + b"\x18\x96\x01")) == [
        (1, b"a"),
        (200, b"b" * 300),
        (3, 150),
    ]


@pytest.mark.parametrize("side", [BARE, BARE_NATIVE])
def test_a_load_counts_the_calls_that_it_made(workplace, side):
    updates = [messages.job_updates([job_id]) for job_id in JOBS]
    with workplace.run(side, ready_replies(workplace, JOBS)) as server, Client(server.address, connections=2) as client:
        load = Load(client, server.api.update, updates)
        load.start()
        calls = len(load.measure(0.5).latencies)
        load.stop()
    assert 50 < calls <= sum(each.sent for each in updates)


def test_a_load_whose_calls_fail_measures_nothing(workplace):
    with workplace.run(BARE) as server, Client(server.address, connections=1) as client:
        load = Load(client, path("DeleteJob"), [lambda: b""])
        load.start()
        with pytest.raises(CallFailedError):
            load.measure(0.2)


@pytest.mark.parametrize(("ours", "verdict"), [(1.2, "0.6 × etcd (≥ 0.5) ok"), (0.9, "0.45 × etcd (≥ 0.5) MISSED")])
def test_a_missed_target_is_marked(ours, verdict):
    values = {GRPCIO: [ours, ours, 9.0], ETCD: [2.0]}
    figure = Figure(
        row="get", name="calls/s", values=values, targets=[Target(column=GRPCIO, beside=ETCD, at_least=0.5)]
    )
    assert verdict in document.whole([], [figure], None)


def test_targets_of_two_workers_are_in_the_list_of_all():
    figure = Figure(
        row="postgres", name="by one", values={TWO_WORKERS: [1.2]}, targets=[Target(column=TWO_WORKERS, at_least=1.5)]
    )
    assert "| by one | 1.2 (≥ 1.5) MISSED |" in document.goals([figure])


def test_the_head_explains_the_columns_that_occur():
    head = document.whole([], [Figure(row="postgres", name="calls/s", values={SQLITE: [2], POSTGRESQL: [1]})], None)
    assert [column for column in document.COLUMNS if f"\n| {column} | " in head] == [SQLITE, POSTGRESQL]


@pytest.mark.slow
def test_postgresql_is_measured_beside_sqlite_and_with_two_workers(workplace):
    figures = {figure.name: figure for figure in ROWS["postgres"].measure(workplace, SMALL)}
    assert tuple(figures["UpdateJob, calls/s, 64 in flight"].values) == STORES
    for costs in (figures[name] for name in figures if "CPU, µs a call" in name):
        assert min(min(values) for values in costs.values.values()) > 5
    assert document.missed(figures[name] for name in figures if name.endswith("changes per update")) == 0


def test_the_databases_cpu_includes_processes_that_have_ended(workplace):
    async def count(url):
        connection = await asyncpg.connect(url)
        await connection.execute("SELECT count(*) FROM generate_series(1, 1000000)")
        await connection.close()

    with database.running(workplace, 1) as store:
        before = store.cpu_seconds()
        asyncio.run(count(store.urls[0]))
        assert store.cpu_seconds() >= before + 0.05


def test_without_the_driver_the_row_of_postgresql_says_what_to_do(workplace, monkeypatch):
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    with pytest.raises(CannotMeasureError, match="asyncpg missing; run make setup"):
        list(ROWS["postgres"].measure(workplace, SMALL))


def test_without_our_transport_the_row_of_postgresql_measures_nothing(workplace):
    assert list(ROWS["postgres"].measure(replace(workplace, sides=[ETCD]), SMALL)) == []


@pytest.mark.parametrize(
    ("last", "word"), [(1.0, "O(1)"), (10.0, "less than"), (100.0, "O(n)"), (1000.0, "MORE"), (0.1, "falls")]
)
def test_growth_is_told_in_a_word(last, word):
    assert growth({1: [1.0], 100: [last]}).startswith(word)


@pytest.mark.parametrize(("flags", "is_written"), [([], False), (["--write"], True)])
def test_one_row_alone_writes_no_document_unless_told(tmp_path, flags, is_written):
    command = [sys.executable, "-m", "benchmarks", "--small", "--only", "finish", "--sides", GRPCIO, *flags]
    paths = {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | paths, capture_output=True, text=True, check=True)
    assert "watchers of 50 that saw the end" in done.stdout
    assert (tmp_path / "BENCHMARKS.md").exists() is is_written
