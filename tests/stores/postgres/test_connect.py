"""How the PostgreSQL store finds its database, and its errors, which never contain the password."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import traceback

import pytest

from jobstatus_grpc.errors import CannotStartError
from jobstatus_grpc.stores.postgres import database as postgres_database
from jobstatus_grpc.stores.postgres.connect import read_address
from jobstatus_grpc.stores.postgres.store import PostgresStore, migrate

SECRET = "sEcReT"
# The driver's messages do not depend on the server's version.
ONE_VERSION = pytest.mark.parametrize("postgres", [18], indirect=True)


def refusal(url: str) -> str:
    """Return why the store cannot be opened, in one line that holds neither the password nor the URL."""
    with pytest.raises(CannotStartError) as caught:
        asyncio.run(PostgresStore.open(url))
    trace = "".join(traceback.format_exception(caught.value))
    assert SECRET not in trace
    assert url not in trace
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def locked_url(postgres, postgres_url):
    """The database, for a role with a password."""
    database = postgres_url.rpartition("/")[2]
    role = f"owner_of_{database}"
    postgres.execute(f"CREATE ROLE {role} LOGIN PASSWORD '{SECRET}'")
    postgres.execute(f"ALTER DATABASE {database} OWNER TO {role}")
    yield postgres_url.replace("jobstatus@", f"{role}:{SECRET}@")
    postgres.execute(f"ALTER DATABASE {database} OWNER TO jobstatus")
    postgres.execute(f"DROP OWNED BY {role} CASCADE", database)
    postgres.execute(f"DROP ROLE {role}")


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://me:{SECRET}/x@host/db",
        f"postgresql://me:{SECRET}@x@host/db",
        f"postgresql://me:{SECRET}?x@host/db",
        f"postgresql://me:{SECRET}#x@host/db",
        f"postgresql://me:{SECRET}",
        f"postgresql://me:1{SECRET}/db",
        f"postgresql:me:{SECRET}@host/db",
        f"postgresql://me:{SECRET}@host:/db",
        f"postgresql://me:{SECRET}@host:0/db",
        f"postgresql://me:{SECRET}@host:99999/db",
        f"postgresql://me:{SECRET}@host,,other/db",
        f"postgresql://me:{SECRET}@[::1/db",
        f"postgresql://me:{SECRET}@host/db?sslmode",
        f"postgresql://me:{SECRET}@host/db?{SECRET}=1",
        f"postgresql://me:{SECRET}@ho st/db",
        f"postgresql://me:{SECRET}@host/db\n",
        f"postgresql://me:{SECRET}\u2100@host/db",
    ],
)
def test_a_url_that_cannot_be_parsed_is_refused_with_the_right_form(url):
    assert "write postgresql://USER@HOST:PORT/DATABASE" in refusal(url)


def test_hosts_and_ports_are_read_as_they_are_written():
    url = "postgresql://me:p%40ss@db-1.example.org,10.0.0.2:5433,[::1]:6000,%2Frun%2Fpg/jobs?sslmode=require"
    hosts = [("db-1.example.org", 5432), ("10.0.0.2", 5433), ("::1", 6000), ("/run/pg", 5432)]
    address = read_address(url)
    assert (address.url, address.hosts) == ("postgresql://me:p%40ss@/jobs?sslmode=require", tuple(hosts))
    assert read_address("postgresql:///jobs?host=/run/pg").hosts == ()


@ONE_VERSION
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda url: url.replace(SECRET, f"{SECRET}x"), "password authentication failed for user .*; check the user"),
        (lambda url: url.replace(f":{SECRET}", ""), "check the user and the password"),
        (lambda url: url.replace("/database_", "/no_such_"), 'database "no_such_.*" does not exist; create it'),
        (lambda url: f"{url}?sslmode=require", "rejected SSL upgrade; see that it runs, and check --store"),
        (lambda url: f"{url}?sslmode=perhaps", "sslmode.* must be one of"),
        (lambda url: f"{url}?sslrootcert=/nowhere", "cannot read the CA file /nowhere: No such file"),
        (lambda url: f"{url}?sslkey=/nowhere", "cannot read the key file /nowhere: No such file"),
        (lambda url: f"{url}?connect_timeout=3", 'unrecognized configuration parameter "connect_timeout"'),
        (lambda url: url.replace("127.0.0.1", "no-such-host.invalid"), "no-such-host.invalid:.*; see that it runs"),
        (lambda url: f"{url}?passfile=/nowhere", "cannot read the password file /nowhere: No such file"),
    ],
)
def test_what_keeps_it_from_opening_is_one_line(locked_url, change, says):
    assert re.search(says, refusal(change(locked_url)))


def test_a_refused_connection_names_the_address():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        assert f"cannot open the store on {where}: Connection refused; see that it runs" in refusal(
            f"postgresql://me:{SECRET}@{where}/db"
        )


def test_a_server_that_does_not_answer_is_given_up(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        where = f"127.0.0.1:{silent.getsockname()[1]}"
        assert "it does not answer in time" in refusal(f"postgresql://me:{SECRET}@{where}/db?sslmode=disable")


def test_the_password_is_in_no_log(locked_url, caplog):
    async def main() -> None:
        asyncio.get_running_loop().set_debug(True)
        store = await PostgresStore.open(locked_url)
        async with store._database.connection() as connection:
            await connection.execute("SELECT 1")
        await store.close()

    with caplog.at_level(logging.DEBUG):
        asyncio.run(main())
        refusal(locked_url.replace("/database_", "/no_such_"))
    assert SECRET not in caplog.text


def test_the_password_may_stand_in_a_file(locked_url, tmp_path):
    file = tmp_path / "passwords"
    file.touch(mode=0o600)
    file.write_text(f"*:*:*:*:{SECRET}\n")
    url = f"{locked_url.replace(f':{SECRET}', '')}?passfile={file}"
    assert asyncio.run(migrate(url)) > 0
    file.chmod(0o644)
    assert f"the password file {file} can be read by others; chmod 600 it" in refusal(url)


def test_the_first_host_that_takes_writes_is_used(postgres_url):
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        others = ",".join(f"127.0.0.1:{each.getsockname()[1]}" for each in (silent, closed))
        url = f"{postgres_url.replace('@', f'@{others},')}?target_session_attrs=read-write"
        assert asyncio.run(migrate(url)) > 0


@pytest.mark.parametrize("new_postgres", [18], indirect=True)
def test_a_standby_alone_is_refused_after_a_while(new_postgres, monkeypatch):
    monkeypatch.setattr(postgres_database, "START_SECONDS", 0.5)
    database = new_postgres.create_database()
    url = new_postgres.standby().url(database)
    assert "name every host, with target_session_attrs=read-write" in refusal(url)
    assert "name every host" in refusal(f"{url}?target_session_attrs=read-write")
