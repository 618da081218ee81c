"""The store's URL from a file, and its password, which shows nowhere."""

from __future__ import annotations

import os
import signal

import psutil
import pytest

from jobstatus_grpc.server.config import ServerConfig
from jobstatus_grpc.stores.postgres.connect import read_address

PASSWORD = "hunter2"

ONE_VERSION = pytest.mark.parametrize("postgres", [18], indirect=True)


@pytest.fixture
def url(postgres_url):
    """The URL of a database, with a password, which this cluster does not ask for."""
    return postgres_url.replace("@", f":{PASSWORD}@", 1)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "store.url"


@pytest.mark.parametrize("by", ["flag", "variable"])
def test_the_url_may_be_in_a_file(offline, file, tmp_path, by):
    file.write_text(f"sqlite:///{tmp_path}/jobs.db\n")
    flags, env = ([f"--store-file={file}"], {}) if by == "flag" else ([], {"JOBSTATUS_STORE_FILE": str(file)})
    done = offline("migrate", *flags, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "jobs.db").exists()


def test_a_flag_wins_over_the_variable_of_the_other(offline, file, tmp_path):
    file.write_text(f"sqlite:///{tmp_path}/file.db\n")
    url = f"sqlite:///{tmp_path}/url.db"
    offline("migrate", "--store", url, env={"JOBSTATUS_STORE_FILE": str(file)})
    assert [(tmp_path / name).exists() for name in ("url.db", "file.db")] == [True, False]
    offline("migrate", "--store-file", str(file), env={"JOBSTATUS_STORE": url})
    assert (tmp_path / "file.db").exists()


@pytest.mark.parametrize("verb", ["serve", "migrate", "backup", "restore"])
@pytest.mark.parametrize(
    ("text", "says"),
    [(None, "cannot be read: No such file"), ("", "must hold the URL"), ("hunter2:\nb\n", "must hold the URL")],
)
def test_a_file_without_a_url_is_one_line_and_exit_2(offline, file, tmp_path, verb, text, says):
    if text is not None:
        file.write_text(text)
    done = offline(verb, *[str(tmp_path / "copy")] * (verb in ("backup", "restore")), "--store-file", str(file))
    assert (done.returncode, done.stderr.count("\n"), says in done.stderr) == (2, 1, True)
    assert PASSWORD not in done.stderr


def test_one_of_the_two_flags_is_enough(offline, file):
    assert "Give one of --store and" in offline("migrate", "--store", "memory:", "--store-file", str(file)).stderr
    assert "Missing option --store or --store-file" in offline("migrate").stderr


@ONE_VERSION
@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_password_shows_in_no_log_metric_or_process_list(offline_cli, cli_of, start, file, url, workers):
    file.write_text(url)
    flags = ["--workers", workers, "--metrics", "127.0.0.1:0", "--log-level", "debug", "--log-format", "text"]
    server = start("serve", "--listen", "127.0.0.1:0", "--store-file", str(file), *flags, by=offline_cli)
    address = server.stdout.readline().split()[-1]
    seen = cli_of(address)("create", "a").stdout + cli_of(address)("health", "--json").stdout
    processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    seen += str([process.cmdline() for process in processes])
    server.send_signal(signal.SIGTERM)
    seen += server.communicate()[1]
    assert (len(processes), server.returncode) == (1 if workers == "1" else 3, 0)
    assert "draining" in seen
    assert PASSWORD not in seen


@ONE_VERSION
@pytest.mark.parametrize("end", ["/none", "/none?sslmode=verify-full", "/none?target_session_attrs=x", "#/x"])
def test_the_password_shows_in_no_error(offline, url, end):
    done = offline("migrate", env={"JOBSTATUS_STORE": url.rpartition("/")[0] + end})
    assert done.returncode in (2, 4)
    assert PASSWORD not in done.stdout + done.stderr


def test_the_password_shows_in_no_repr():
    url = f"postgresql://me:{PASSWORD}@host/db"
    assert PASSWORD not in repr([ServerConfig(store=url), read_address(url)])


@pytest.mark.parametrize(("mode", "says"), [(0o644, "by others; chmod 600 it"), (None, "cannot read the pass")])
def test_a_pgpassfile_that_would_be_ignored_is_an_error(offline, tmp_path, mode, says):
    passfile = tmp_path / "pgpass"
    if mode is not None:
        passfile.touch()
        os.chmod(passfile, mode)
    done = offline("migrate", "--store", "postgresql://me@127.0.0.1:9/db", env={"PGPASSFILE": str(passfile)})
    assert (done.returncode, says in done.stderr) == (2, True)
