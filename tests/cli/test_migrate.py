"""`jobstatus migrate`: prepares a store beforehand."""

from __future__ import annotations

import pytest

from jobstatus_grpc.stores.sql.migrations import migrations

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


@pytest.mark.parametrize("verb", ["migrate", "serve"])
@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("postgresql://me:secret@127.0.0.1:9/db", "cannot open the store on 127.0.0.1:9"),
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


def test_a_newer_schema_ends_the_server_with_one_line(offline_cli, postgres, postgres_url):
    offline_cli("migrate", "--store", postgres_url)
    postgres.execute("UPDATE jobstatus.schema_version SET version = 99", postgres_url.rpartition("/")[2])
    done = offline_cli("serve", "--store", postgres_url, "--listen", "127.0.0.1:0")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "newer than" in done.stderr


def test_it_wants_a_store(offline_cli):
    done = offline_cli("migrate")
    assert (done.returncode, "--store" in done.stderr) == (2, True)
