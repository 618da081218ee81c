"""The examples of docs/relay.md run."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys

import pytest

from tests.support.receiver import RelayProcess


@pytest.fixture
def page(pytestconfig):
    return (pytestconfig.rootpath / "docs" / "relay.md").read_text()


def test_each_command_is_accepted(page, service, place_url, tmp_path):
    page = page.replace("postgresql://relay@db.example/relays", place_url)
    (tmp_path / "slack-url").write_text("https://hooks.slack.example/services/X")
    (secret,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    subprocess.run(["sh", "-c", secret], cwd=tmp_path, check=True)
    for line in re.findall(r"^\$ jobstatus relay (.*)$", page, re.MULTILINE):
        command = [sys.executable, "-m", "jobstatus_grpc", "relay", "--address", service.address, *shlex.split(line)]
        with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("relaying to ")
            process.terminate()
        assert process.returncode == 0


def test_the_receiver_takes_what_the_relay_sends(page, service, new_id, tmp_path):
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    program = program.replace("8000", "0").replace(
        "server.serve", "print(server.server_port, flush=True)\nserver.serve"
    )
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(
        command, env={"SECRET": secret}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as receiver:
        assert receiver.stdout is not None
        url = f"http://127.0.0.1:{receiver.stdout.readline().strip()}"
        job_id = new_id()
        with RelayProcess(
            service.address, tmp_path, "--id", job_id, "--webhook", url, JOBSTATUS_WEBHOOK_SECRET=secret
        ) as relay:
            service.job_in("SUCCEEDED", id=job_id)
            assert receiver.stdout.readline() == f"{job_id} jobstatus.v1.job.succeeded\n"
            assert relay.dead_letters == []
        receiver.kill()


def test_the_event_has_the_members_that_are_shown(page, service, new_id, tmp_path):
    (shown,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    job_id, out = new_id(), tmp_path / "out"
    with RelayProcess(
        service.address, tmp_path, "--id", job_id, "--exec", f"cat > {out}.new; mv {out}.new {out}"
    ) as relay:
        service.job_in("FAILED", id=job_id)
        while not out.exists():
            relay.wait_until_said("relaying to")
    event = json.loads(out.read_text())
    assert list(event) == list(json.loads(shown))
    assert {**event["data"], **json.loads(shown)["data"]}.keys() == event["data"].keys() | {"..."}
