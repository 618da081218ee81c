"""The PostgreSQL clusters for tests behave as the tests assume."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.postgres import ROLE, PostgresCluster, PostgresHome
from tests.support.postgres_guard import servers

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def fill(cluster: PostgresCluster, database: str) -> None:
    cluster.execute("CREATE TABLE numbers AS SELECT generate_series(1, 1000) AS number", database)


def count(cluster: PostgresCluster, database: str) -> list[list[str]]:
    return cluster.execute("SELECT count(*) FROM numbers", database)


@pytest.mark.parametrize("_turn", [1, 2])
def test_each_test_has_an_empty_database(postgres, postgres_url, _turn):
    database = postgres_url.rpartition("/")[2]
    assert postgres.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'", database) == []
    fill(postgres, database)


def test_a_database_is_dropped_while_it_is_used(postgres):
    database = postgres.create_database()
    fill(postgres, database)
    user = subprocess.Popen(postgres.command("SELECT 'here', pg_sleep(60)", database), stderr=subprocess.DEVNULL)
    while not postgres.execute(f"SELECT 1 FROM pg_stat_activity WHERE datname = '{database}' AND state = 'active'"):
        time.sleep(0.01)
    postgres.drop_database(database)
    assert user.wait(10) != 0
    assert postgres.execute(f"SELECT 1 FROM pg_database WHERE datname = '{database}'") == []


def test_the_role_owns_its_database_and_is_no_superuser(postgres, postgres_url):
    database = postgres_url.rpartition("/")[2]
    owner = (
        "SELECT pg_get_userbyid(datdba), rolsuper FROM pg_database, pg_roles WHERE datname = '{}' AND rolname = '{}'"
    )
    assert postgres.execute(owner.format(database, ROLE)) == [[ROLE, "f"]]


def test_commits_wait_for_the_disk(postgres):
    settings = "SELECT current_setting('fsync'), current_setting('synchronous_commit')"
    assert postgres.execute(settings) == [["on", "on"]]


def test_a_statement_that_fails_says_why(postgres):
    with pytest.raises(AssertionError, match="division by zero"):
        postgres.execute("SELECT 1 / 0")


def test_what_is_committed_survives_kill_and_restart(new_postgres):
    database = new_postgres.create_database()
    fill(new_postgres, database)
    url = new_postgres.url(database)
    new_postgres.kill()
    assert not new_postgres.is_running
    new_postgres.start()
    assert count(new_postgres, database) == [["1000"]]
    new_postgres.restart()
    assert count(new_postgres, database) == [["1000"]]
    assert new_postgres.url(database) == url


def test_a_promoted_standby_has_every_commit(new_postgres):
    database = new_postgres.create_database()
    standby = new_postgres.standby()
    fill(new_postgres, database)
    new_postgres.kill()
    standby.promote()
    assert count(standby, database) == [["1000"]]
    standby.execute("INSERT INTO numbers VALUES (1001)", database)
    assert count(standby, database) == [["1001"]]


def test_a_promoted_standby_is_the_same_system_on_another_timeline(new_postgres, postgres_shared):
    identity = "SELECT system_identifier, left(pg_walfile_name(pg_current_wal_lsn()), 8) FROM pg_control_system()"
    ((system, timeline),) = new_postgres.execute(identity)
    standby = new_postgres.standby()
    new_postgres.kill()
    standby.promote()
    assert standby.execute(identity) == [[system, "00000002"]]
    assert timeline == "00000001"
    assert postgres_shared(new_postgres.version).execute(identity)[0][0] != system


def test_a_commit_waits_for_the_standby(new_postgres):
    database = new_postgres.create_database()
    standby = new_postgres.standby()
    standby.stop()
    writer = subprocess.Popen(new_postgres.command("CREATE TABLE one ()", database))
    waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    while not new_postgres.execute(waiting):
        time.sleep(0.01)
    standby.start()
    assert writer.wait(20) == 0


def test_no_server_stays_when_the_tests_are_killed():
    program = "from tests.support.postgres import *; home = PostgresHome(); cluster = PostgresCluster(18, home);"
    program += "cluster.start(); print(home.path, flush=True); cluster._process.wait()"
    tests = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert tests.stdout is not None
    home = Path(tests.stdout.readline().strip())
    running = list(servers(home))
    assert running
    tests.kill()
    tests.communicate()
    psutil.wait_procs(running, timeout=20)
    while home.exists():
        time.sleep(0.01)
    assert list(servers(home)) == []


def test_a_home_that_closes_ends_its_servers():
    home = PostgresHome()
    cluster = PostgresCluster(16, home)
    cluster.start()
    home.close()
    assert not cluster.is_running
    assert not home.path.exists()
