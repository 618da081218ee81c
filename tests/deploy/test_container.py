"""Dockerfile and compose.yaml. There is no container engine in the tests: the steps of the Dockerfile run by hand."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
import yaml

from tests.support.certificates import Authority


@pytest.fixture(scope="module")
def steps(root):
    """The instructions of the Dockerfile, each in one line."""
    text = re.sub(r"\\\n *", "", (root / "Dockerfile").read_text())
    return [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]


def values(steps, instruction):
    return [rest for name, rest in steps if name == instruction]


def test_hadolint_finds_nothing(root, program):
    done = subprocess.run([program("hadolint"), root / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_context_has_the_files_that_are_copied_and_no_others(root, steps):
    copied = {name for rest in values(steps, "COPY") if "--from" not in rest for name in rest.split()[:-1]}
    allowed = re.findall(r"^!(.*)$", (root / ".dockerignore").read_text(), re.MULTILINE)
    assert set(allowed) == copied
    assert all((root / name).exists() for name in copied)


def test_the_compose_file_keeps_its_schema(root, program):
    command = [program("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", root / "compose.yaml"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_files_of_envoy_are_secrets_of_the_compose_file(root):
    compose = yaml.safe_load((root / "compose.yaml").read_text())
    targets = {secret["target"] for secret in compose["services"]["envoy"]["secrets"]}
    assert targets == set(re.findall(r"filename: ([^}]+)", (root / "deploy/proxies/envoy.yaml").read_text()))


def test_the_commands_of_the_document_make_the_files_of_the_compose_file(root, tmp_path):
    section = (root / "docs/deployment.md").read_text().partition("## Docker Compose")[2]
    block = re.search(r"```console\n(.*?)```", section, re.DOTALL)
    assert block is not None
    commands = re.findall(r"^\$ ((?:.*\\\n)*.*)$", block[1], re.MULTILINE)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    script = "\n".join(each for each in commands if not each.startswith(("docker", "jobstatus whoami")))
    environment = {"PATH": path, "HOME": str(tmp_path)}
    subprocess.run(["bash", "-euc", script], cwd=tmp_path, env=environment, check=True, timeout=30)
    compose = yaml.safe_load((root / "compose.yaml").read_text())
    files = [tmp_path / secret["file"] for secret in compose["secrets"].values()]
    assert all(file.stat().st_mode & 0o077 == 0 for file in files)
    password = (tmp_path / "secrets/postgres-password").read_text().strip()
    assert f":{password}@postgres/jobs" in (tmp_path / "secrets/store-url").read_text()
    assert "[[tokens]]" in (tmp_path / "secrets/auth/auth.toml").read_text()
    assert f"JOBSTATUS_USER={os.getuid()}:{os.getgid()}" in (tmp_path / ".env").read_text()


@pytest.fixture(scope="module")
def image(root, steps, tmp_path_factory):
    """A folder with what the first stage installs, in a Python environment like the image's."""
    folder = tmp_path_factory.mktemp("image")
    source = folder / "source"
    for rest in values(steps, "COPY"):
        *names, target = rest.split()
        if "--from=build" not in names:
            for name in names:
                place = source / (target if target != "./" else name)
                copy = shutil.copytree if (root / name).is_dir() else shutil.copy
                place.parent.mkdir(parents=True, exist_ok=True)
                copy(root / name, place)
    build = values(steps, "RUN")[0].replace("/opt/jobstatus", str(folder / "opt"))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["sh", "-euc", build], cwd=source, env={**os.environ, "PATH": path}, check=True)
    shutil.rmtree(source)
    return folder


@pytest.fixture
def folder():
    """The root of a container, with a short path, because it is to hold sockets."""
    with tempfile.TemporaryDirectory(prefix="js-") as name:
        yield Path(name)


@pytest.mark.interop
@pytest.mark.timeout(300)
def test_the_installed_server_is_healthy_and_writes_to_two_folders_only(steps, image, program, auth, folder):
    pair = Authority().issue()
    auth.admit("robot")
    for name in ("etc/jobstatus/auth", "etc/jobstatus/tls", "var/lib/jobstatus", "run/jobstatus"):
        (folder / name).mkdir(parents=True)
    shutil.copy(auth.path, folder / "etc/jobstatus/auth/auth.toml")
    (folder / "etc/jobstatus/tls/tls.crt").write_bytes(pair.cert)
    (folder / "etc/jobstatus/tls/tls.key").write_bytes(pair.key)

    def command(arguments):
        for place in ("/etc/jobstatus", "/var/lib/jobstatus", "/run/jobstatus"):
            arguments = arguments.replace(place, f"{folder}{place}")
        return [image / "opt/bin/jobstatus", *json.loads(arguments.replace("0.0.0.0:50051", "127.0.0.1:0"))]

    environment = {"PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": f"{folder}/run/jobstatus", "PATH": os.environ["PATH"]}
    trace = [program("strace"), "-f", "-qq", "-e", "trace=openat,mkdir", "-o", folder / "trace"]
    serve = [*trace, *command(values(steps, "CMD")[-1])]
    with subprocess.Popen(serve, env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline().startswith("listening on ")
        check = values(steps, "HEALTHCHECK")[0].partition(' CMD ["jobstatus", ')[2]
        assert subprocess.run(command(f"[{check}"), env=environment, timeout=60).returncode == 0
        (traced,) = psutil.Process(server.pid).children()
        traced.terminate()
        assert server.wait(30) == 0
    opened = re.findall(r'"([^"]+)", (?:O_RDWR|O_WRONLY|0).* = \d+$', (folder / "trace").read_text(), re.MULTILINE)
    folders = (f"{folder}/var/lib/jobstatus", f"{folder}/run/jobstatus", "/dev/")
    assert len(opened) > 3
    assert [path for path in opened if not path.startswith(folders)] == []
