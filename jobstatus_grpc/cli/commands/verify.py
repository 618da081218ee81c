"""`jobstatus verify`: does a server keep the contract? Checks of each rule, then a random load and its judgement."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import click

from jobstatus_grpc.cli import exits, options, output, parsers
from jobstatus_grpc.cli.connection import connected
from jobstatus_grpc.cli.options import duration_flag, flag
from jobstatus_grpc.cli.target import Connection

if TYPE_CHECKING:
    from jobstatus_grpc.client.endpoint import Endpoint
    from jobstatus_grpc.verify.checker import Violation
    from jobstatus_grpc.verify.conformance import Result
    from jobstatus_grpc.verify.history import Entry
    from jobstatus_grpc.verify.recorder import Recorder

DEFAULT_DURATION = timedelta(seconds=20)
"""With the checks before it and the judgement after it, the command ends within a minute, also on a busy machine."""

CLIENTS = parsers.count(1000, smallest=1)


@dataclass(slots=True)
class Verdict:
    """What was checked, and what was found."""

    label: str = ""
    """Of all jobs of the run."""
    results: list[Result] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    jobs: int = 0
    left: int = 0
    """Jobs that could not be deleted."""

    @property
    def is_good(self) -> bool:
        """Whether nothing was found."""
        return not self.violations and not any(result.problem for result in self.results)


@click.command()
@flag("--replica HOST:PORT", "Another server of the same store. May be repeated.", multiple=True, type=parsers.address)
@duration_flag(
    "--duration DURATION",
    "How long the random load runs.",
    default=parsers.spell(DEFAULT_DURATION),
    shortest=timedelta(seconds=1),
    longest=timedelta(days=7),
)
@flag("--clients N", "Number of workers; half as many read, half as many watch.", type=CLIENTS, default=8)
@flag("--seed N", "Repeat the random choices of an earlier run. Default: a new seed.", type=int)
@options.labels("A label of all jobs that are created. May be repeated.")
@duration_flag(
    "--patience DURATION",
    "Time within which a watcher must receive a change.",
    default="5s",
    shortest=timedelta(milliseconds=100),
    longest=timedelta(hours=1),
)
@flag("--history FILE", "Judge a recorded history instead of a server.", type=click.Path(exists=True, dir_okay=False))
@flag("--save FILE", "Write the history as JSON lines, about 5 kB for each call.", type=parsers.new_file)
@flag("--junit FILE", "Write the results as JUnit XML.", type=parsers.new_file)
@flag("--json", "Print the results as JSON.", to="as_json")
@connected
@click.pass_context
def verify(
    ctx: click.Context,
    /,
    *,
    connection: Connection,
    replica: Sequence[str],
    duration: timedelta,
    clients: int,
    seed: int | None,
    labels: Sequence[tuple[str, str]],
    patience: timedelta,
    history: str | None,
    save: str | None,
    junit: str | None,
    as_json: bool,
) -> None:
    """Check whether a server keeps the contract of jobstatus.v1.

    First each rule of the API, by itself. Then a random load of racing workers, readers and watchers, whose recorded
    calls are judged: no acknowledged write lost, no old read, one winner of each race, each watch complete to its end.
    It is safe on a server in use: it touches its own jobs only, and deletes them. The caller needs the role operator.

    Exits with 0 if nothing was found, 1 if the contract is broken, 4 if the server cannot be reached.
    """
    from jobstatus_grpc.verify import checker
    from jobstatus_grpc.verify import history as histories

    verdict = Verdict()
    if history is not None:
        try:
            entries = histories.read(Path(history))
        except (ValueError, OSError) as error:
            raise click.UsageError(str(error)) from None
        if not entries:
            raise click.UsageError(f"{history} has no calls")
    else:
        seed = random.SystemRandom().randrange(2**32) if seed is None else seed
        own = {**dict(labels), "verify": uuid.uuid4().hex}
        addresses = (connection.address, *replica)
        endpoints = [dataclasses.replace(connection, address=address).endpoint() for address in addresses]
        timeout_seconds = connection.timeout_seconds
        load = _Load(duration.total_seconds(), patience.total_seconds(), clients, seed, own, timeout_seconds, as_json)
        entries = asyncio.run(_run(endpoints, load, verdict))
    verdict.calls = Counter(entry.method for entry in entries)
    verdict.violations = checker.check(entries, patience_seconds=patience.total_seconds())
    if save is not None:
        histories.write(entries, Path(save))
    if junit is not None:
        _write_junit(verdict, Path(junit))
    shown = _write_shown(verdict, f"verify-{seed}") if history is None else {}
    if as_json:
        click.echo(output.in_json(_in_json(verdict, seed)))
    else:
        _print(verdict, seed, len(checker.RULES), shown)
    ctx.exit(exits.SUCCEEDED if verdict.is_good else exits.FAILED)


@dataclass(frozen=True, slots=True)
class _Load:
    seconds: float
    patience_seconds: float
    clients: int
    seed: int
    labels: Mapping[str, str]
    timeout_seconds: float
    is_quiet: bool


async def _run(endpoints: Sequence[Endpoint], load: _Load, verdict: Verdict) -> list[Entry]:
    """Run the checks and the random load, and return the history of both."""
    from jobstatus_grpc.verify import conformance
    from jobstatus_grpc.verify.recorder import Recorder
    from jobstatus_grpc.verify.workload import Workload

    async with Recorder(endpoints, timeout_seconds=load.timeout_seconds) as recorder:
        verdict.label = f"verify={load.labels['verify']}"
        await _require_access(recorder, load.labels)

        def report(result: Result) -> None:
            if not load.is_quiet:
                click.echo(_line_of(result))

        verdict.results, verdict.left = await conformance.run(recorder, labels=load.labels, report=report)
        workload = Workload(recorder, labels=load.labels, seed=load.seed, clients=load.clients)
        try:
            await workload.run(load.seconds, patience_seconds=load.patience_seconds)
        finally:
            verdict.jobs = len(workload.made)
            # The history ends here: what follows deletes the jobs under the eyes of no watcher.
            entries = list(recorder.entries)
            verdict.left += await recorder.delete(workload.made)
        return entries


async def _require_access(recorder: Recorder, labels: Mapping[str, str]) -> None:
    """End the command unless each server answers, and lets the caller create and delete a job."""
    from jobstatus.v1 import job_status_pb2 as pb

    job = pb.JobStatus(id=f"verify-{uuid.uuid4().hex}", name="verify", labels=labels)
    requests: list[tuple[str, Any, int]] = [
        ("GetJob", pb.GetJobRequest(id=job.id), server) for server in range(recorder.size)
    ]
    requests += [
        ("CreateJob", pb.CreateJobRequest(job=job), 0),
        ("CancelJob", pb.CancelJobRequest(id=job.id), 0),
        ("DeleteJob", pb.DeleteJobRequest(id=job.id), 0),
    ]
    try:
        for method, request, server in requests:
            entry = await recorder.call(method, request, server=server)
            if entry.code in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
                exits.say_error(f"no answer from {entry.server}: {entry.message}")  # it may be a replica
                raise click.exceptions.Exit(exits.UNREACHABLE)
            if entry.code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
                raise click.UsageError(f"{method} on {entry.server} is refused: {entry.message}")
    except asyncio.CancelledError:
        await recorder.delete([job.id])
        raise


def _line_of(result: Result) -> str:
    if result.skipped:
        return f"skip  {result.name}: {result.skipped}"
    return f"FAIL  {result.name}: {result.problem}" if result.problem else f"ok    {result.name}"


def _print(verdict: Verdict, seed: int | None, rules: int, shown: Mapping[str, Path]) -> None:
    failed = sum(bool(result.problem) for result in verdict.results)
    skipped = sum(bool(result.skipped) for result in verdict.results)
    if verdict.results:
        click.echo(f"\n{len(verdict.results)} checks, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    calls = f"{sum(verdict.calls.values()):,} calls"
    if verdict.jobs:
        calls += f", {verdict.jobs:,} jobs under random load (seed {seed})"
    found = len(verdict.violations)
    click.echo(f"{calls}, judged by {rules} rules: {found} violation{'' if found == 1 else 's'}")
    for rule, count in Counter(violation.rule for violation in verdict.violations).items():
        first = next(violation for violation in verdict.violations if violation.rule == rule)
        where = f"; its calls are in {shown[rule]}" if rule in shown else ""
        click.echo(f"FAIL  {rule}, {count} of them: {first.text}{where}")
    if verdict.left:
        exits.say_error(f"{verdict.left} jobs could not be deleted; they have the label {verdict.label}")


def _write_shown(verdict: Verdict, prefix: str) -> dict[str, Path]:
    """Write the entries of the first violation of each rule, and return the files."""
    from jobstatus_grpc.verify import history as histories

    files: dict[str, Path] = {}
    for violation in verdict.violations:
        if violation.rule not in files:
            path = Path(f"{prefix}-{violation.rule}.jsonl")
            try:
                histories.write(violation.entries, path)
            except OSError as error:
                exits.say_error(f"the calls of {violation.rule} could not be written to {path}: {error.strerror}")
            else:
                files[violation.rule] = path
    return files


def _in_json(verdict: Verdict, seed: int | None) -> dict[str, Any]:
    return {
        "passed": verdict.is_good,
        **({} if seed is None else {"seed": seed}),
        "checks": [
            {"name": result.name, "rule": result.rule, "problem": result.problem, "skipped": result.skipped}
            for result in verdict.results
        ],
        "calls": dict(verdict.calls),
        "jobs": verdict.jobs,
        "violations": [
            {"rule": violation.rule, "text": violation.text, "calls": [entry.number for entry in violation.entries]}
            for violation in verdict.violations
        ],
    }


def _write_junit(verdict: Verdict, path: Path) -> None:
    from jobstatus_grpc.verify import checker

    cases = [(result.name, result.seconds, result.problem, result.skipped) for result in verdict.results]
    for rule in checker.RULES:
        name = checker.name_of(rule)
        texts = [violation.text for violation in verdict.violations if violation.rule == name]
        cases.append((name, 0.0, "; ".join(texts[:10]), ""))
    suite = ElementTree.Element("testsuite", name="jobstatus verify", tests=str(len(cases)))
    suite.set("failures", str(sum(bool(problem) for _, _, problem, _ in cases)))
    suite.set("skipped", str(sum(bool(skipped) for _, _, _, skipped in cases)))
    for name, seconds, problem, skipped in cases:
        case = ElementTree.SubElement(suite, "testcase", classname="jobstatus.v1", name=name, time=f"{seconds:.3f}")
        if problem:
            ElementTree.SubElement(case, "failure", message=problem)
        if skipped:
            ElementTree.SubElement(case, "skipped", message=skipped)
    ElementTree.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)
