"""What the modules of frameworks import, and say without them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from jobstatus_grpc.contrib.task import job_id_of

EXTRAS = {
    "jobstatus_grpc.contrib.celery": ("celery", "celery"),
    "jobstatus_grpc.contrib.dramatiq": ("dramatiq", "dramatiq"),
    "jobstatus_grpc.contrib.jupyter": ("IPython", "jupyter"),
    "jobstatus_grpc.contrib.pytest": ("pytest", "pytest"),
    "jobstatus_grpc.contrib.rq": ("rq", "rq"),
    "jobstatus_grpc.tqdm": ("tqdm", "tqdm"),
}


@pytest.mark.parametrize("module", EXTRAS)
def test_a_module_without_its_framework_names_the_extra(module):
    framework, extra = EXTRAS[module]
    program = f"import sys; sys.modules[{framework!r}] = None; import {module}"
    failed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert failed.stderr.splitlines()[-1].endswith(f": pip install 'jobstatus-grpc[{extra}]'")


def test_the_plugin_of_pytest_imports_no_grpc():
    program = "import sys, jobstatus_grpc.contrib.pytest; sys.exit('grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize("task_id", ["a", "d6a1b1f0-0c5e-4c1e-8e0e-0c9a4d9a8f11", "x" * 128])
def test_a_job_has_the_id_of_its_task(task_id):
    assert job_id_of(task_id) == task_id


def test_ids_that_a_job_cannot_have_stay_different():
    ids = ["", "a b", "a/b", "é", "\ud800", "x" * 129, "x" * 130]
    made = {job_id_of(task_id) for task_id in ids}
    assert len(made) == len(ids)
    assert all(0 < len(job_id) <= 128 and job_id.isascii() for job_id in made)
