"""Google's Go client of long-running operations. Its Python clients are in tests/server/test_operations.py."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from google.rpc import code_pb2

GO = {"GO111MODULE": "off", "GOPATH": "/usr/share/gocode", "GOFLAGS": ""}


@pytest.mark.interop
@pytest.mark.timeout(300)
def test_googles_go_client_waits_lists_and_deletes(serve, tmp_path):
    program = str(tmp_path / "operations")
    source = str(Path(__file__).with_name("operations.go"))
    subprocess.run(["go", "build", "-o", program, source], env={**os.environ, **GO}, check=True)
    service = serve()
    job = service.job_in("IN_PROGRESS")
    with subprocess.Popen([program, service.address, f"jobs/{job.id}"], stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "waiting\n"
        service.update(job.id, state="JOB_STATE_FAILED")
        said = client.stdout.read().splitlines()
    assert said == [f"jobs/{job.id} true {code_pb2.UNKNOWN} OK", "1 OK", "OK", "NotFound"]
