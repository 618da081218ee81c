"""A job filter as SQL. One condition selects jobs through its index, in the order of creation; the others are checked
on each of them. Which condition has the fewest jobs is counted first, where it is not obvious.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache, lru_cache
from typing import Any, NamedTuple

from jobstatus_grpc.job import JobFilter, JobState
from jobstatus_grpc.stores.paging import MAX_EXAMINED_ROWS, read_cursor
from jobstatus_grpc.stores.sql.rows import from_instant

MAX_ARMS = 100
"""The number of names that are read through the index, each by a SELECT of its own. SQLite merges at most 500."""

MAX_COUNTED_ROWS = 1000
"""The number of rows up to which the jobs of a condition are counted: above it, no choice saves much."""

_MAX_INTEGER = 2**63 - 1


@dataclass(frozen=True, slots=True, eq=False)
class Dialect:
    """How one kind of database writes the queries."""

    jobs: str
    """The table of jobs in a FROM clause, where its name is `jobs`."""
    labels: str
    """The table of labels in a FROM clause."""
    parameter: Callable[[str, str], str]
    """`parameter(name, sql_type)` returns the place of a parameter of `parameters_of`."""
    end_of_texts: str | bytes
    """A value that is greater than all names."""
    index_hint: str = ""
    """Follows `jobs`, with `{}` in place of the index's name."""
    subquery_end: str = ""
    """Ends a subquery that must be executed for each row, and not be turned into a join."""

    def jobs_by(self, index: str) -> str:
        """Return `jobs`, to be read through `index`."""
        return self.jobs + self.index_hint.format(index)


class Criterion(NamedTuple):
    """One condition of a filter."""

    dialect: Dialect
    source: str
    """A table with its index, for a FROM clause."""
    key: str
    """The column that holds the job's key."""
    arms: tuple[str, ...]
    """Conditions on `source`, one per value, each of which its index finds; empty if no index does."""
    residual: str
    """The condition on `jobs` and on `place`, its created_at and key."""
    residual_in_index: str = ""
    """The same on `place` only, where that has the job's state and stalled; empty if that does not suffice."""
    has_state: bool = False
    """Whether the index of `source` contains state and stalled, so that a page need not read the jobs to check them."""
    is_ordered: bool = True
    """Whether the index returns each arm's jobs in the order of creation; else they must be sorted."""
    is_best: bool = False
    """Whether it has so few jobs that the others need not be counted."""

    def selects_of_arms(self) -> list[str]:
        """Return one query per arm for created_at and key of the jobs within the filter's bounds, in no order."""
        place = self.dialect.parameter
        bounds = (
            f"created_at >= {place('since', 'bigint')} AND "
            f"(created_at, {self.key}) < ({place('until', 'bigint')}, {place('until_key', 'bigint')})"
        )
        return [f"{self._select(arm)} AND {bounds}" for arm in self.arms]

    def selects(self) -> str:
        """Return those queries as one."""
        return " UNION ALL ".join(self.selects_of_arms())

    def examined(self) -> str:
        """Return the query for the rows that have to be read for `selects`."""
        return self.selects() if self.is_ordered else " UNION ALL ".join(self._select(arm) for arm in self.arms)

    @property
    def max_counted(self) -> int:
        """The number of jobs up to which they are counted."""
        return MAX_COUNTED_ROWS if self.is_ordered else MAX_EXAMINED_ROWS

    def _select(self, arm: str) -> str:
        tenant = self.dialect.parameter("tenant", "text")
        columns = f"created_at, {self.key} AS key{', state, stalled' if self.has_state else ''}"
        return f"SELECT {columns} FROM {self.source} WHERE tenant = {tenant} AND {arm}"


def parameters_of(tenant: str, job_filter: JobFilter, dialect: Dialect, *, limit: int, cursor: str) -> dict[str, Any]:
    """Return all parameters of the queries for a page, by name. The queries read one job more than `limit`.

    Raises:
        InvalidTokenError: `cursor` is not a cursor.
    """
    since, before = job_filter.created_after, job_filter.created_before
    until = (_MAX_INTEGER, 0) if before is None else (from_instant(before), 0)  # keys are above 0
    if cursor:
        until = min(until, read_cursor(cursor))
    parameters = {
        "tenant": tenant,
        "limit": limit + 1,
        "examined": MAX_EXAMINED_ROWS,
        "skipped": MAX_EXAMINED_ROWS - 1,
        "counted": MAX_COUNTED_ROWS,
        "since": -_MAX_INTEGER if since is None else from_instant(since),
        "until": until[0],
        "until_key": until[1],
        "parent_id": job_filter.parent_id,
        "prefix": job_filter.name_prefix,
        "prefix_end": _prefix_end(job_filter.name_prefix, dialect),
    }
    parameters |= {f"id{number}": value for number, value in enumerate(_padded_ids(job_filter))}
    parameters |= {f"name{number}": value for number, value in enumerate(job_filter.names)}
    for number, (state, stalled) in enumerate(_pairs(job_filter)):
        parameters |= {f"state{number}": int(state), f"stalled{number}": stalled}
    for number, (name, value) in enumerate(sorted(job_filter.labels.items())):
        parameters |= {f"label{number}": name, f"value{number}": value}
    return parameters


def criteria_of(job_filter: JobFilter, dialect: Dialect) -> list[Criterion]:
    """Return the criteria of a filter; first those that usually have the fewest jobs."""
    return [criterion for _, criteria in _CRITERIA for criterion in criteria(job_filter, dialect)]


def counts_of(criteria: Sequence[Criterion]) -> str:
    """Return the query for the counts that `choose` needs, in one row; empty if it needs none."""
    candidates = _candidates(criteria)
    is_clear = not candidates or (len(candidates) == 1 and (candidates[0].is_best or candidates[0].is_ordered))
    return "" if is_clear else _counts(candidates)


def choose(criteria: Sequence[Criterion], counts: Sequence[int], dialect: Dialect) -> Criterion:
    """Return the criterion whose index has the fewest jobs to examine.

    Args:
        criteria: all criteria of the filter.
        counts: the row that the query of `counts_of` returned; empty if there was no query.
        dialect: as given to `criteria_of`.
    """
    candidates = _candidates(criteria)
    if not counts:
        return candidates[0] if candidates else any_job(dialect)
    known = zip(counts, candidates, strict=True)
    sizes = [(count if count <= each.max_counted else math.inf, each) for count, each in known]
    # With too many jobs to sort, no page can be made.
    usable = [(size, each) for size, each in sizes if each.is_ordered or size < math.inf]
    return min(usable, key=lambda entry: entry[0], default=(0, any_job(dialect)))[1]


def residuals_of(criteria: Sequence[Criterion], chosen: Criterion) -> tuple[str, ...]:
    """Return the conditions of all criteria but the chosen one; first those that need no read of `jobs`."""
    others = [each for each in criteria if each is not chosen]
    in_index = [each.residual_in_index for each in others if chosen.has_state and each.residual_in_index]
    return (*in_index, *(each.residual for each in others if not (chosen.has_state and each.residual_in_index)))


def _candidates(criteria: Sequence[Criterion]) -> tuple[Criterion, ...]:
    candidates = tuple(criterion for criterion in criteria if criterion.arms)
    return candidates[:1] if candidates and candidates[0].is_best else candidates


@lru_cache(maxsize=1024)
def _counts(criteria: tuple[Criterion, ...]) -> str:
    counts = (
        f"(SELECT count(*) FROM (SELECT 1 FROM ({criterion.examined()}) AS arms LIMIT {limit} + 1) AS found)"
        for criterion in criteria
        for limit in [criterion.dialect.parameter("counted" if criterion.is_ordered else "examined", "bigint")]
    )
    return f"SELECT {', '.join(counts)}"


# The criteria of each field. Their texts depend on the number of values only, so that there are few to prepare.


def _of_ids(job_filter: JobFilter, dialect: Dialect) -> list[Criterion]:
    return [_by_ids(dialect, len(_padded_ids(job_filter)))] if job_filter.ids else []


@cache
def _by_ids(dialect: Dialect, count: int) -> Criterion:
    condition = f"id IN ({', '.join(dialect.parameter(f'id{number}', 'text') for number in range(count))})"
    source = dialect.jobs_by("sqlite_autoindex_jobs_1")  # of UNIQUE (tenant, id)
    return Criterion(dialect, source, "key", (condition,), "", is_ordered=False, is_best=True)


def _padded_ids(job_filter: JobFilter) -> list[str]:
    """Return the ids, the last one repeated up to a power of two, so that there are few different queries."""
    ids = sorted(job_filter.ids)
    return ids + ids[-1:] * ((1 << (len(ids) - 1).bit_length()) - len(ids)) if ids else []


def _of_parent(job_filter: JobFilter, dialect: Dialect) -> list[Criterion]:
    return [_by_parent(dialect)] if job_filter.parent_id else []


@cache
def _by_parent(dialect: Dialect) -> Criterion:
    parent = dialect.parameter("parent_id", "text")
    arm = f"parent_id = {parent} AND parent_id <> ''"  # the index leaves out jobs without a parent
    source = dialect.jobs_by("jobs_by_parent")
    return Criterion(dialect, source, "key", (arm,), f"jobs.parent_id = {parent}", has_state=True)


def _of_labels(job_filter: JobFilter, dialect: Dialect) -> list[Criterion]:
    return [_by_label(dialect, number) for number in range(len(job_filter.labels))]


@cache
def _by_label(dialect: Dialect, number: int) -> Criterion:
    name, value = dialect.parameter(f"label{number}", "text"), dialect.parameter(f"value{number}", "text")
    condition = f"name = {name} AND value = {value}"
    tenant = dialect.parameter("tenant", "text")
    place = f"tenant = {tenant} AND created_at = place.created_at AND job_key = place.key"
    subquery = f"SELECT 1 FROM {dialect.labels} WHERE {place} AND {condition}{dialect.subquery_end}"
    return Criterion(dialect, dialect.labels, "job_key", (condition,), f"EXISTS ({subquery})")


def _of_names(job_filter: JobFilter, dialect: Dialect) -> list[Criterion]:
    names = job_filter.names
    return [_by_names(dialect, len(names), is_indexed="" not in names and len(names) <= MAX_ARMS)] if names else []


@cache
def _by_names(dialect: Dialect, count: int, *, is_indexed: bool) -> Criterion:
    names = [dialect.parameter(f"name{number}", "text") for number in range(count)]
    arms = tuple(f"name = {name} AND name <> ''" for name in names) if is_indexed else ()
    source, residual = dialect.jobs_by("jobs_by_name"), f"jobs.name IN ({', '.join(names)})"
    return Criterion(dialect, source, "key", arms, residual, has_state=True)


def _of_prefix(job_filter: JobFilter, dialect: Dialect) -> list[Criterion]:
    return [_by_prefix(dialect)] if job_filter.name_prefix else []


@cache
def _by_prefix(dialect: Dialect) -> Criterion:
    begin, end = dialect.parameter("prefix", "text"), dialect.parameter("prefix_end", "text")
    arm = f"name >= {begin} AND name < {end} AND name <> ''"
    residual = f"jobs.name >= {begin} AND jobs.name < {end}"
    source = dialect.jobs_by("jobs_by_name")
    return Criterion(dialect, source, "key", (arm,), residual, has_state=True, is_ordered=False)


def _prefix_end(prefix: str, dialect: Dialect) -> str | bytes:
    """Return the first text after all that begin with `prefix`, in the order of code points, which is that of UTF-8."""
    kept = prefix.rstrip("\U0010ffff")
    if not kept:
        return dialect.end_of_texts
    following = ord(kept[-1]) + 1
    return kept[:-1] + chr(0xE000 if following == 0xD800 else following)  # surrogates are not characters


def _of_states(job_filter: JobFilter, dialect: Dialect) -> list[Criterion]:
    is_set = job_filter.states or job_filter.done is not None or job_filter.stalled is not None
    return [_by_states(dialect, len(_pairs(job_filter)))] if is_set else []


@cache
def _by_states(dialect: Dialect, count: int) -> Criterion:
    places = [
        (dialect.parameter(f"state{number}", "smallint"), dialect.parameter(f"stalled{number}", "smallint"))
        for number in range(count)
    ]
    arms = tuple(f"state = {state} AND stalled = {stalled}" for state, stalled in places)
    values = ", ".join(f"({state}, {stalled})" for state, stalled in places)
    in_jobs, in_index = (f"({table}.state, {table}.stalled) IN (VALUES {values})" for table in ("jobs", "place"))
    return Criterion(dialect, dialect.jobs_by("jobs_by_state"), "key", arms, in_jobs, in_index)


def _pairs(job_filter: JobFilter) -> list[tuple[JobState, int]]:
    """Return the combinations of state and stalled that a matching job may have."""
    stalled = (0, 1) if job_filter.stalled is None else (int(job_filter.stalled),)
    return [
        (state, value)
        for state in sorted(job_filter.possible_states)
        for value in (stalled if state is JobState.IN_PROGRESS else (0,))
    ]


@cache
def any_job(dialect: Dialect) -> Criterion:
    """Return the criterion of a filter without conditions: every state, which `parameters_of` then lists."""
    return _by_states(dialect, len(_pairs(JobFilter())))


BOUNDS = ("created_after", "created_before")
"""The fields that are no criteria: every criterion's query is within these bounds."""

_CRITERIA: Sequence[tuple[Sequence[str], Callable[[JobFilter, Dialect], list[Criterion]]]] = (
    (("ids",), _of_ids),
    (("parent_id",), _of_parent),
    (("labels",), _of_labels),
    (("names",), _of_names),
    (("name_prefix",), _of_prefix),
    (("states", "done", "stalled"), _of_states),
)
"""The criteria by the fields that they come from; first those that usually have the fewest jobs."""


def check_fields(filter_type: type[JobFilter]) -> None:
    """Raise TypeError if a field of the filter has no criterion: a list would ignore it, and return too many jobs."""
    covered = {*BOUNDS, *(name for names, _ in _CRITERIA for name in names)}
    missing = sorted({field.name for field in fields(filter_type)} - covered)
    if missing:
        raise TypeError(f"stores/sql/criteria.py has no criterion for {filter_type.__name__}.{', '.join(missing)}")


check_fields(JobFilter)
