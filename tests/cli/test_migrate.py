"""`jobstatus migrate`: prepares a store beforehand."""

from __future__ import annotations

import pytest

from jobstatus_grpc.stores.sql.migrations import migrations
from tests.support.servers import ServerProcess

NEWEST = len(migrations("jobstatus_grpc.stores.postgres"))


def test_it_prints_the_version_of_the_schema(offline_cli, postgres, postgres_url):
    for _ in range(2):
        done = offline_cli("migrate", "--store", postgres_url)
        line = f"the store's schema has version {NEWEST}\n"
        assert (done.stdout, done.stderr, done.returncode) == (line, "", 0)


@pytest.mark.parametrize("url", ["memory:", "sqlite:///{}/jobs.db"])
def test_it_opens_other_stores_once(offline_cli, tmp_path, url):
    done = offline_cli("migrate", env={"JOBSTATUS_STORE": url.format(tmp_path)})
    assert (done.stdout, done.stderr, done.returncode) == ("the store is up to date\n", "", 0)


def test_a_sqlite_store_that_is_served_is_refused(offline_cli, tmp_path):
    url = f"sqlite:///{tmp_path}/jobs.db"
    with ServerProcess(store=url):
        done = offline_cli("migrate", "--store", url)
    assert (done.stdout, done.returncode) == ("", 2)
    assert "has it open" in done.stderr


@pytest.mark.parametrize("verb", ["migrate", "serve"])
@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("postgresql://me:sec/ret@127.0.0.1:9/db", "cannot be understood"),
        ("oracle://me:secret@host", "no store has the scheme"),
        ("sqlite:////dev/null/jobs.db", "/dev/null"),
    ],
)
def test_a_store_that_cannot_be_opened_is_one_line_and_exit_2(offline_cli, verb, url, says):
    done = offline_cli(verb, "--store", url)
    assert (done.stdout, done.returncode, done.stderr.count("\n")) == ("", 2, 1)
    assert done.stderr.startswith("error: ")
    assert says in done.stderr
    assert "sec" not in done.stderr


@pytest.mark.parametrize("verb", [["migrate"], ["serve"], ["serve", "--workers", "2"]])
@pytest.mark.parametrize(
    ("host", "says"),
    [("127.0.0.1:9", "Connection refused"), ("no-such-host.invalid:9", "Name or service not known")],
)
def test_a_database_that_cannot_be_reached_is_one_line_and_exit_4(offline_cli, verb, host, says):
    done = offline_cli(*verb, "--store", f"postgresql://me:secret@{host}/db", env={"JOBSTATUS_LISTEN": "127.0.0.1:0"})
    assert (done.stdout, done.returncode) == ("", 4)
    assert done.stderr == f"error: cannot open the store on {host}: {says}; see that it runs, and check --store\n"


@pytest.mark.parametrize("verb", [["migrate"], ["serve"], ["serve", "--workers", "2"]])
def test_a_database_that_refuses_is_one_line_and_exit_2(offline_cli, postgres, verb):
    server = f"127.0.0.1:{postgres.port}"
    for user, says in (
        ("me:secret", "password authentication failed"),
        ("jobstatus", 'database "none" does not exist'),
    ):
        store, anywhere = f"postgresql://{user}@{server}/none", {"JOBSTATUS_LISTEN": "127.0.0.1:0"}
        done = offline_cli(*verb, "--store", store, env=anywhere)
        assert (done.stdout, done.returncode, done.stderr.count("\n")) == ("", 2, 1)
        assert f"cannot open the store on {server}: {says}" in done.stderr


def test_a_newer_schema_ends_the_server_with_one_line(offline_cli, postgres, postgres_url):
    offline_cli("migrate", "--store", postgres_url)
    postgres.execute("UPDATE jobstatus.schema_version SET version = 99", postgres_url.rpartition("/")[2])
    done = offline_cli("serve", "--store", postgres_url, "--listen", "127.0.0.1:0")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "newer than" in done.stderr


def test_it_wants_a_store(offline_cli):
    done = offline_cli("migrate")
    assert (done.returncode, "--store" in done.stderr) == (2, True)
