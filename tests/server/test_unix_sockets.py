"""The permissions of what a server creates: its Unix sockets and its store are for its user alone."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
import threading

import pytest

from jobstatus_grpc import JobStatusClient
from jobstatus_grpc.server.addresses import CannotListenError, held


def mode_of(path):
    return stat.S_IMODE(os.stat(path).st_mode)


@pytest.fixture(params=["grpcio", "native"])
def serve_on(request, tmp_path):
    """Serve on a socket, from a process with a umask of 0 and `flags`; return all modes that the socket ever had."""
    processes = []

    def serve(*flags):
        path, modes, is_ready = str(tmp_path / "socket"), set(), threading.Event()

        def follow_mode():
            while not is_ready.is_set():
                with contextlib.suppress(FileNotFoundError):
                    modes.add(mode_of(path))

        follower = threading.Thread(target=follow_mode)
        follower.start()
        command = [sys.executable, "-m", "jobstatus_grpc", "serve", "--transport", request.param, *flags]
        processes.append(
            subprocess.Popen(
                [*command, "--listen", f"unix:{path}", "--store", f"sqlite:///{tmp_path}/jobs.db"],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                umask=0,
            )
        )
        output = processes[0].stdout
        assert output is not None
        line = output.readline()
        is_ready.set()
        follower.join()
        assert line == f"listening on unix:{path}\n"
        return path, modes

    yield serve
    for process in processes:
        process.kill()
        process.communicate()


def test_a_socket_is_at_no_time_open_to_other_users(serve_on):
    path, modes = serve_on()
    assert mode_of(path) == 0o600
    assert not any(mode & 0o077 for mode in modes)
    with JobStatusClient(f"unix:{path}") as client:
        assert client.create("backup").name == "backup"


def test_a_socket_gets_the_mode_that_the_flag_says(serve_on):
    path, _ = serve_on("--unix-mode", "0660")
    assert mode_of(path) == 0o660


def test_the_store_is_for_its_user_alone(serve_on, tmp_path):
    serve_on()
    files = [each for each in tmp_path.iterdir() if each.name != "socket"]
    assert {each.name: mode_of(each) for each in files if mode_of(each) & 0o077} == {}
    assert tmp_path / "jobs.db" in files


def test_a_link_in_place_of_a_sockets_lock_is_not_followed(tmp_path):
    (tmp_path / "socket.lock").symlink_to(tmp_path / "made")
    with pytest.raises(CannotListenError, match=r"cannot create .*socket\.lock"), held([f"unix:{tmp_path}/socket"]):
        pass
    assert not (tmp_path / "made").exists()
