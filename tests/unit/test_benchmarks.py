"""The benchmark's own parts, against real servers: its requests to etcd, its load, and its verdicts."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from uuid import uuid4
from xml.etree import ElementTree

import asyncpg
import pytest

from benchmarks import document, overview, picture
from benchmarks.load.apis import path
from benchmarks.load.client import CallFailedError, Client
from benchmarks.peers import postgresql
from benchmarks.report import EACH, Figure, Target, growth
from benchmarks.results import Results
from benchmarks.rows import ROWS, postgres
from benchmarks.rows.calls import Subject, updating
from benchmarks.rows.peers import celery_figures
from benchmarks.rows.postgres import POSTGRESQL, SQLITE, STORES, TWO_WORKERS
from benchmarks.rows.watching import END_MARK, Audience
from benchmarks.servers import (
    BARE,
    BARE_NATIVE,
    CELERY,
    ETCD,
    GRPCIO,
    NATS,
    POSTGRES,
    REDIS,
    SMALL,
    Bench,
    CannotMeasureError,
    Cores,
    missing,
)  # fmt: skip

JOBS = ["job-0", "job-1"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(Cores(), tmp_path_factory.mktemp("benchmarks"), SMALL)


@pytest.fixture(scope="module", params=[ETCD, GRPCIO, NATS, REDIS, POSTGRES])
def server(bench, request):
    if reason := missing(request.param):
        pytest.skip(reason)
    with bench.run(request.param) as server:
        yield server


def run_benchmarks(directory, *options, **environment):
    command = [sys.executable, "-m", "benchmarks", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=True)


@pytest.fixture
def job_id():
    return str(uuid4())


@pytest.fixture
def client(server, job_id):
    with server.client(connections=2) as client:
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


def test_a_lone_caller_goes_through_all_jobs(bench):
    with bench.run(GRPCIO) as server:
        [next_request] = updating(server, [[job_id] for job_id in JOBS]).lanes(1)
        assert [job_id.encode() in next_request() for job_id in (*JOBS, *JOBS)] == [True] * 4


@pytest.mark.parametrize("callers", [1, 3])
def test_callers_share_out_the_jobs(callers):
    subject = Subject(None, "", [partial(bytes, [number]) for number in range(6)])  # type: ignore[arg-type]
    assert sorted(lane() for lane in subject.lanes(callers) for _ in range(6 // callers)) == [
        bytes([number]) for number in range(6)
    ]


@pytest.mark.slow
def test_celery_is_measured_on_postgresql(bench):
    if reason := missing(CELERY):
        pytest.skip(reason)
    with postgresql.run(bench, bench.directory) as server:
        figures = celery_figures(server.address, 2, 0.5, jobs=16)
    assert figures["update: calls/s, 2 in flight"] > 0
    assert figures["read: p50, ms, 2 in flight"] > 0


def test_a_system_without_its_server_is_left_out_with_the_reason(tmp_path):
    options = ["--small", "--only", "finish", "--sides", REDIS]
    done = run_benchmarks(tmp_path, *options, PATH=str(tmp_path))
    assert "left out: Redis, because redis-server is missing: apt-get install redis-server" in done.stdout


@pytest.mark.parametrize(("ours", "verdict"), [(1.2, "0.6 × etcd (≥ 0.5) ok"), (0.9, "0.45 × etcd (≥ 0.5) MISSED")])
def test_a_missed_target_is_marked(ours, verdict):
    values = {GRPCIO: [ours, ours, 9.0], ETCD: [2.0]}
    figure = Figure("calls/s", "get", values, [Target(GRPCIO, "≥", 0.5, ETCD)])
    assert verdict in document.whole([], [figure])


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"), [(20, 20, "20 (≤ 30) ok"), (80, 100, "0.8 × etcd (≤ 0.9) ok"), (95, 100, "MISSED")]
)
def test_either_of_two_bounds_is_enough(ours, theirs, verdict):
    target = Target(GRPCIO, "≤", 30, otherwise=Target(GRPCIO, "≤", 0.9, ETCD))
    assert verdict in document.goals([Figure("p99", "change", {GRPCIO: [ours], ETCD: [theirs]}, [target])])


def test_results_are_read_as_they_were_written(tmp_path):
    targets = [Target(GRPCIO, "≤", 30, otherwise=Target(GRPCIO, "≤", 0.9, ETCD)), Target(EACH, "=", 1)]
    figures = [Figure("p99", "change", {GRPCIO: [1, 2.5], ETCD: [1000]}, targets, "goal", choose=min)]
    Results(["a machine"], figures).write(tmp_path)
    assert Results.read(tmp_path) == Results(["a machine"], figures)


def test_a_later_run_of_one_row_replaces_that_row_only():
    results = Results([], [Figure("a", "get", {GRPCIO: [1]}), Figure("a", "update", {GRPCIO: [1]})])
    results.replace(["get"], [Figure("b", "get", {GRPCIO: [2]})])
    assert [(figure.row, figure.name) for figure in results.figures] == [("get", "b"), ("update", "a")]


def test_the_first_line_about_a_machine_is_the_same_in_each_run(tmp_path):
    assert document.describe_machine(tmp_path)[0] == document.describe_machine(tmp_path)[0]
    assert "load" not in document.describe_machine(tmp_path)[0]


def test_a_run_of_all_rows_keeps_the_figures_of_those_that_it_leaves_out():
    kept = Results(["a machine", "old"], [Figure("a", "get", {GRPCIO: [1]}), Figure("a", "pythons", {"3.13": [1]})])
    results = Results(["a machine", "new"], [Figure("b", "get", {GRPCIO: [2]})])
    results.keep_apart(kept)
    assert [(figure.row, figure.name) for figure in results.figures] == [("get", "b"), ("pythons", "a")]
    assert results.about == ["a machine", "new", "in a run of their own: pythons"]
    elsewhere = Results(["another machine"], [])
    elsewhere.keep_apart(kept)
    assert elsewhere == Results(["another machine"], [])


@pytest.mark.slow
def test_a_version_of_python_is_a_column(bench, monkeypatch):
    found = dict.fromkeys(("3.12", "3.13"), sys.executable)
    monkeypatch.setattr("benchmarks.rows.pythons.find_python", found.get)
    figures = {figure.name: figure for figure in ROWS["pythons"].measure(replace(bench, sides=[GRPCIO]))}
    assert [*figures["UpdateJob: calls/s, 64 in flight"].values] == ["grpcio, 3.12", "grpcio, 3.13"]


def test_with_one_version_of_python_there_is_nothing_to_compare(bench, monkeypatch):
    monkeypatch.setattr("benchmarks.rows.pythons.find_python", {"3.13": sys.executable}.get)
    with pytest.raises(CannotMeasureError, match="install another"):
        ROWS["pythons"].measure(bench)


def test_the_documents_are_made_of_the_results():
    if results := Results.read(ROOT):
        assert {path: (ROOT / path).read_text() for path in results.documents()} == results.documents()


def test_the_picture_and_the_table_show_every_system_that_was_measured():
    values = {GRPCIO: [1_250.0], REDIS: [3_400.0], CELERY: [17.0]}
    figures = [Figure("update: calls/s, 64 in flight", "peers", values)]
    texts = {element.text for element in ElementTree.fromstring(picture.svg(figures)).iter() if element.text}
    assert {"this service, grpcio", "1,250", "Redis", "3,400", "Celery on PostgreSQL", "17", "no watch"} <= texts
    assert [line[0] for line in overview.lines(figures)] == [
        "",
        "this service, grpcio",
        "Redis",
        "Celery on PostgreSQL",
    ]


def test_targets_of_two_workers_are_in_the_list_of_all():
    figure = Figure("by one", "postgres", {TWO_WORKERS: [1.2]}, [Target(TWO_WORKERS, "≥", 1.5)])
    assert "| by one | 1.2 (≥ 1.5) MISSED |" in document.goals([figure])


def test_the_head_explains_the_columns_that_occur():
    head = document.whole([], [Figure("calls/s", "postgres", {SQLITE: [2], POSTGRESQL: [1]})])
    assert [column for column in document.COLUMNS if f"\n| {column} | " in head.partition("How it was")[2]] == [
        SQLITE,
        POSTGRESQL,
    ]


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
    done = run_benchmarks(tmp_path, "--small", "--only", "finish", "--sides", GRPCIO, *flags)
    assert "watchers of 50 that saw the end" in done.stdout
    assert (tmp_path / "BENCHMARKS.md").exists() is is_written
