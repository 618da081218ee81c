"""Files that are read again when they change: only regular files of a bounded size are read."""

from __future__ import annotations

import os
import time

import pytest

from jobstatus_grpc.auth.key_sets import KeySource
from jobstatus_grpc.client.endpoint import Tls, endpoint
from jobstatus_grpc.client.token import RenewedToken
from jobstatus_grpc.errors import CannotStartError
from jobstatus_grpc.files import MAX_FILE_BYTES, read_file
from jobstatus_grpc.server.metrics import TokenFile
from jobstatus_grpc.server.tls import TlsFiles, read
from jobstatus_grpc.toml_file import read_toml
from tests.support.auth import AuthText

READERS = {
    "settings": lambda path: read_toml(str(path), {}),
    "server TLS": lambda path: read(TlsFiles(cert=str(path), key=str(path))),
    "client TLS": lambda path: endpoint("localhost:1", tls=Tls(ca_file=path)),
    "client token": RenewedToken,
    "metrics token": lambda path: TokenFile(str(path)).read(),
    "token of a key set": lambda path: KeySource(url="https://localhost:1", token_file=str(path)).fetch(),
    "CA of a key set": lambda path: KeySource(url="https://localhost:1", ca_file=str(path)).fetch(),
}


@pytest.fixture
def fifo(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    return tmp_path / "link"


@pytest.mark.parametrize("reader", READERS)
def test_a_fifo_is_refused_at_once(fifo, reader):
    with pytest.raises((CannotStartError, OSError), match="it is not a regular file"):
        READERS[reader](fifo)


@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_is_too_large_is_refused(tmp_path, reader):
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises((CannotStartError, OSError), match=r"it has more than \d+ bytes"):
        READERS[reader](path)


def test_a_file_that_links_lead_to_is_read(tmp_path):
    (tmp_path / "file").write_bytes(b"text")
    (tmp_path / "link").symlink_to("file")
    assert read_file(tmp_path / "link") == b"text"


def test_a_server_with_a_fifo_in_place_of_its_auth_file_serves_on_and_ends(serve, refused, tmp_path):
    auth, log = AuthText(tmp_path / "auth.toml"), tmp_path / "log"
    auth.admit("ci")
    service = serve("--auth", str(auth.path), log=log)
    auth.path.unlink()
    os.mkfifo(auth.path)
    while "auth.toml cannot be read: it is not a regular file" not in log.read_text():
        time.sleep(0.02)
    assert refused(service.create).kind == ("UNAUTHENTICATED", "NO_IDENTITY")
    assert service.process.terminate() == 0
