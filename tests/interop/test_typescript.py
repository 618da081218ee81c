"""The example in TypeScript, compiled with the generated client. test_languages.py has those in Go and Java."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from tests.interop.test_languages import BUILD_SECONDS, make


@pytest.mark.slow
@pytest.mark.timeout(BUILD_SECONDS)
def test_a_program_that_is_compiled_with_the_generated_client_works_and_watches(service: Any) -> None:
    for arguments in ["typescript"], ["run-typescript", f"ADDRESS={service.address}"]:
        task, environment = make(*arguments)
        done = subprocess.run(task, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    watched = [line.removeprefix("watch: ") for line in lines if line.startswith("watch: ")]
    assert watched[-1] == "SUCCEEDED"
    assert set(watched) <= {"IN_PROGRESS", "SUCCEEDED"}
    assert [line for line in lines if not line.startswith(("job: ", "watch: "))] == [
        "claimed: attempt 1", "progress: 25", "progress: 50", "progress: 75", "unknown job: NotFound",
    ]  # fmt: skip
    job = service.get(next(line for line in lines if line.startswith("job: ")).removeprefix("job: "))
    assert (job.state, job.progress, dict(job.result)) == (4, 100, {"steps": 3})
