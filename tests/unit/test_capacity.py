"""The model of docs/capacity.md, compared with a run."""

from __future__ import annotations

import pytest

from benchmarks.capacity import CREATION, END, UPDATE, Costs, Workload
from benchmarks.rows.cost import measure, run_jobs
from benchmarks.servers import NATIVE, SMALL, Bench, Cores


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("capacity")


@pytest.fixture(scope="module")
def server(folder):
    with Bench(Cores(), folder, SMALL).run(NATIVE, folder) as server:
        run_jobs(server, folder, 200, 5, prefix="warm-up")
        yield server


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_model_predicts_cpu_time_and_disk_of_twenty_thousand_updates(server, folder):
    part = Workload(jobs=500, updates=10, reads=1, watchers=0)
    predicted_cpu = predicted_bytes = cpu = size = 0.0
    for number in range(4):  # in turns, so that other load on the machine affects both
        costs = Costs.of(measure(server, folder, 300, 4, prefix=f"measured-{number}"))
        predicted_cpu, predicted_bytes = (
            predicted_cpu + costs.cpu_seconds(part),
            predicted_bytes + costs.written_bytes(part),
        )
        for step_cpu, step_bytes in run_jobs(server, folder, 500, 10, prefix=f"job-{number}").values():
            cpu, size = cpu + step_cpu, size + step_bytes
    assert cpu == pytest.approx(predicted_cpu, rel=0.25)
    assert size == pytest.approx(predicted_bytes, rel=0.25)


def test_jobs_are_kept_for_their_retention_and_changes_for_a_day():
    costs = Costs(cpu={}, bytes={CREATION: 400, UPDATE: 40, END: 100})
    assert costs.kept_bytes(Workload(jobs=10, updates=5, retention_days=7)) == 10 * (500 * 7 + 200)
