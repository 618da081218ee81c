"""deploy/systemd: systemd's own checks, and the server with the unit's command line and restrictions.

No systemd is booted: one that runs on the file system of this machine would act on it, and empties /tmp.
"""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from jobstatus_grpc import JobStatusClient, Tls
from tests.support.certificates import Authority

UNIT = Path(__file__).parents[2] / "deploy/systemd/jobstatus.service"
PROGRAM = "/opt/jobstatus/bin/jobstatus"
BINARY = str(Path(sys.executable).with_name("jobstatus"))

CONFINED = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(65, 1, 0, 0, 0):  # PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN: as MemoryDenyWriteExecute=
    sys.exit(os.strerror(ctypes.get_errno()))
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture
def installed(tmp_path):
    """The unit with a program that exists, since systemd-analyze looks for it."""
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace(PROGRAM, BINARY))
    return copy


@pytest.fixture
def analyze(program, tmp_path):
    path = program("systemd-analyze")
    return lambda *arguments: subprocess.run([path, *arguments], cwd=tmp_path, capture_output=True, text=True)


@pytest.mark.parametrize("drop_in", [None, "postgres.conf"])
def test_systemd_verifies_the_unit(analyze, installed, drop_in):
    if drop_in is not None:
        folder = installed.with_name(f"{installed.name}.d")
        folder.mkdir()
        (folder / drop_in).write_text(UNIT.with_name(drop_in).read_text().replace(PROGRAM, BINARY))
    done = analyze("verify", "--recursive-errors=no", str(installed))
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_its_exposure_is_below_2(analyze, installed):
    done = analyze("security", "--offline=true", "--threshold=20", "--no-pager", str(installed))
    assert done.returncode == 0, done.stdout


def command_of(unit: str, folder: Path) -> list[str]:
    """The command line of the unit, with the folders of a test for systemd's, and a free port."""
    found = re.search(r"^ExecStart=((?:.*\\\n)*.*)$", unit, re.MULTILINE)
    assert found is not None
    line = found[1].replace("\\\n", " ").replace(PROGRAM, BINARY).replace("0.0.0.0:50051", "127.0.0.1:0")
    for specifier in "tSEd":
        line = line.replace(f"%{specifier}", str(folder / specifier))
    return shlex.split(line)


@pytest.fixture
def folders(tmp_path, auth):
    """Certificate, key and auth file in the folders that the unit names."""
    authority = Authority()
    pair = authority.issue()
    for name in ("t/jobstatus", "S/jobstatus", "E/jobstatus", "d"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "d/tls.crt").write_bytes(pair.cert)
    (tmp_path / "d/tls.key").write_bytes(pair.key)
    auth.admit("robot")
    shutil.copy(auth.path, tmp_path / "E/jobstatus/auth.toml")
    authority.write(tmp_path)
    return tmp_path


def test_its_command_serves_in_memory_that_is_never_executable_after_writing(folders, auth):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(folders / "notify"))
        manager.settimeout(20)
        environment = {"NOTIFY_SOCKET": str(folders / "notify"), "TMPDIR": str(folders / "t/jobstatus")}
        confined = [sys.executable, "-c", CONFINED, *command_of(UNIT.read_text(), folders)]
        confined[3:4] = [sys.executable, BINARY]
        with subprocess.Popen(confined, env=environment, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            port = server.stdout.readline().rpartition(":")[2].strip()
            assert manager.recv(100) == b"READY=1"
            tls = Tls(ca_file=str(folders / "ca.pem"))
            with JobStatusClient(f"localhost:{port}", tls=tls, token=auth.tokens["robot"]) as client:
                assert client.create("under systemd").revision == 1
            server.send_signal(signal.SIGTERM)
            assert server.wait(20) == 0


@pytest.mark.interop
def test_the_filter_allows_the_system_calls_of_a_server(program, analyze, folders, auth):
    trace = folders / "trace"
    command = [program("strace"), "-f", "-qq", "-o", str(trace), *command_of(UNIT.read_text(), folders)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = server.stdout.readline().rpartition(":")[2].strip()
        tls = Tls(ca_file=str(folders / "ca.pem"))
        with JobStatusClient(f"localhost:{port}", tls=tls, token=auth.tokens["robot"], timeout_seconds=30) as client:
            job = client.create("under systemd")
            client.update(job.id, state="succeeded")
            assert list(client.watch(job.id))[-1].done
        (traced,) = psutil.Process(server.pid).children()
        traced.terminate()
        server.wait(30)
    used = set(re.findall(r"^\d+ +(\w+)\(", trace.read_text(), re.MULTILINE))
    denied = used - set_of(analyze, "@system-service")
    denied |= used & (set_of(analyze, "@privileged") | set_of(analyze, "@resources"))
    assert denied <= {"fchown"}  # by SQLite, as root only


def set_of(analyze, name):
    """The system calls of a set, with the sets in it."""
    listed = analyze("syscall-filter", name).stdout
    words = re.findall(r"^ +([@\w-]+)$", listed, re.MULTILINE)
    return {each for word in words for each in (set_of(analyze, word) if word.startswith("@") else {word})}
