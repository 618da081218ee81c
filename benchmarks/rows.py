"""All that can be measured, in the order of BENCHMARKS.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from benchmarks import changes_growth, clients, crowds, fanout, jobs_growth, postgres, restart, unary
from benchmarks.plan import Plan
from benchmarks.report import Figure
from benchmarks.servers import Workplace


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Something to measure."""

    title: str
    text: str
    """How it is measured, for readers of its figures."""
    measure: Callable[[Workplace, Plan], Iterator[Figure]]


ROWS: Mapping[str, Row] = {
    "get": Row(
        title="GetJob",
        text="Callers that read a job each, again and again; etcd: Range of a key, linearizable. The value of etcd's "
        "key is the same JobStatus message. The target holds at 64 callers.",
        measure=unary.get_job,
    ),
    "update": Row(
        title="UpdateJob",
        text="Callers that report progress of a job each, as soon as the update before is answered, which is once it "
        "is on the disk; etcd: Put. The bare handlers keep nothing. The target holds at 64 callers.",
        measure=unary.update_job,
    ),
    "batch": Row(
        title="BatchUpdateJobs",
        text="8 callers that report progress of a hundred jobs each in one call.",
        measure=unary.batch_update,
    ),
    "postgres": Row(
        title="PostgreSQL, and several workers",
        text="Updates as above, all served with grpcio: UpdateJob over 16 connections, each of which belongs to one "
        "worker, BatchUpdateJobs over 8. One server process has one core, and the load the other; the database and two "
        "workers run on both. So database, load and workers share two cores here, and 1.5 times one worker's rate "
        "cannot be had where database and load take more than a third of the server's time a call: with S, P and L "
        "for the CPU time a call of one worker, of PostgreSQL and of the load, two workers whose calls cost the same "
        "make at most 2·S / (S + P + L) times what one makes that has all of its core. Two workers with cores of their "
        "own would make twice as many calls, divided by what a call costs them as a multiple of one worker's.",
        measure=postgres.postgres,
    ),
    "fanout": Row(
        title="A burst to many watchers",
        text="Each watcher has a stream of its own, 50 of them share a connection. 50 updates of their job are sent "
        "one after the other, then its end. etcd sends every change, several in a message to a watcher that lags; our "
        "service skips to the newest.",
        measure=fanout.fan_out,
    ),
    "change": Row(
        title="One change to many watchers",
        text="10 single changes, each after a pause of a quarter of a second; all watchers of all changes are taken "
        "together. The time begins as the update is sent.",
        measure=fanout.one_change,
    ),
    "finish": Row(
        title="Watches that meet the end",
        text="Watches are opened in the same instant as their job's final update: half before it, half after.",
        measure=fanout.finish,
    ),
    "watchers": Row(
        title="Idle watchers",
        text="Watchers of one job, more and more, with three changes at each size. Then nothing happens: a heartbeat "
        "each 30 s. Measured once.",
        measure=crowds.watchers,
    ),
    "restart": Row(
        title="Restart under watches",
        text="Watches of our Python client in 4 processes that share the core of the load. The server is stopped with "
        "SIGTERM, drains, and is started again on the same port and store.",
        measure=restart.restart,
    ),
    "jobs": Row(
        title="Growth with jobs",
        text="A SQLite file each, made with BatchUpdateJobs, all served with grpcio at the same time and asked in "
        "turns. Jobs are chosen at random. Pages are the first of 50 jobs, and no job matches the rare conjunction. "
        "With 1 call in flight where nothing else is said.",
        measure=jobs_growth.jobs,
    ),
    "changes": Row(
        title="Growth with changes",
        text="One SQLite file with a thousand jobs whose changes grow. A watch resumes with a token from before all "
        "changes, or with the newest. Served with grpcio.",
        measure=changes_growth.changes,
    ),
    "client": Row(
        title="The Python client beside the raw stub",
        text="GetJob with a deadline, in turns of a quarter of a second, from one process on the core of the load; "
        "the client returns a dataclass and retries, the stub a message.",
        measure=clients.client,
    ),
    "reporter": Row(
        title="A worker with a thousand jobs",
        text="A process whose jobs report progress 10 times a second each, through `reporter()` of the sync client.",
        measure=clients.reporter,
    ),
}
