"""The fields of a job filter as SQL: which index reads the jobs, and what asks a job that another index gave."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

from jobstatus_grpc.job import JobFilter, JobState
from jobstatus_grpc.stores.paging import MAX_EXAMINED_ROWS, read_cursor
from jobstatus_grpc.stores.sql.rows import from_instant

MAX_ARMS = 100
"""So many names are read side by side; SQLite merges at most 500."""

MAX_COUNTED_ROWS = 1000
"""What has more jobs than this is no better than another that has."""

_MAX_INTEGER = 2**63 - 1

_AFTER_ALL_TEXTS = b""  # SQLite's order


class Criterion(NamedTuple):
    """One condition of a filter. Its parameters are named as in `parameters_of`."""

    source: str
    """A table with its index."""
    key: str
    """The column that holds the job's key."""
    arms: tuple[str, ...]
    """Conditions on `source`, one per value; none where no index helps."""
    residual: str
    """The condition on `jobs` and on `place`, its created_at and key."""
    is_ordered: bool = True
    """Whether each arm reads jobs in the order of creation; else they have to be sorted."""
    is_best: bool = False
    """Whether it has so few jobs that no other needs to be looked at."""

    def selects(self) -> str:
        """Return the query of created_at and key of the jobs within the bounds, in no order."""
        return " UNION ALL ".join(self.selects_of_arms())

    def selects_of_arms(self) -> list[str]:
        """Return the queries that make up that one."""
        bounds = f"created_at >= :since AND (created_at, {self.key}) < (:until, :until_key)"
        return [f"{self._select(arm)} AND {bounds}" for arm in self.arms]

    def examined(self) -> str:
        """Return the query of what has to be looked at for that."""
        return self.selects() if self.is_ordered else " UNION ALL ".join(self._select(arm) for arm in self.arms)

    @property
    def max_counted(self) -> int:
        """How many jobs are counted at most. If it has more, all that is known of it is that it has."""
        return MAX_COUNTED_ROWS if self.is_ordered else MAX_EXAMINED_ROWS

    def _select(self, arm: str) -> str:
        return f"SELECT created_at, {self.key} AS key FROM {self.source} WHERE tenant = :tenant AND {arm}"


def parameters_of(tenant: str, job_filter: JobFilter, *, limit: int, cursor: str) -> dict[str, Any]:
    """Return the values of all parameters that the queries for a page have; they read one job more than its `limit`.

    Raises:
        InvalidTokenError: `cursor` is none.
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
        "prefix_end": _prefix_end(job_filter.name_prefix),
    }
    parameters |= {f"id{number}": value for number, value in enumerate(_padded_ids(job_filter))}
    parameters |= {f"name{number}": value for number, value in enumerate(job_filter.names)}
    for number, (state, stalled) in enumerate(_pairs(job_filter)):
        parameters |= {f"state{number}": int(state), f"stalled{number}": stalled}
    for number, (name, value) in enumerate(sorted(job_filter.labels.items())):
        parameters |= {f"label{number}": name, f"value{number}": value}
    return parameters


def criteria_of(job_filter: JobFilter) -> list[Criterion]:
    """Return the criteria of a filter, those that most often leave the fewest jobs first. Its bounds are none."""
    criteria: list[Criterion] = []
    if job_filter.ids:
        criteria.append(_by_ids(len(_padded_ids(job_filter))))
    if job_filter.parent_id:
        criteria.append(_BY_PARENT)
    criteria.extend(_by_label(number) for number in range(len(job_filter.labels)))
    if job_filter.names:
        criteria.append(_by_names(len(job_filter.names), is_indexed="" not in job_filter.names))
    if job_filter.name_prefix:
        criteria.append(_BY_PREFIX)
    if job_filter.states or job_filter.done is not None or job_filter.stalled is not None:
        criteria.append(_by_states(len(_pairs(job_filter))))
    return criteria


def counts_of(criteria: Sequence[Criterion]) -> str:
    """Return the query of the numbers that `choose` needs, in one row; empty where it needs none."""
    candidates = _candidates(criteria)
    is_clear = not candidates or (len(candidates) == 1 and (candidates[0].is_best or candidates[0].is_ordered))
    return "" if is_clear else _counts(candidates)


def choose(criteria: Sequence[Criterion], counts: Sequence[int]) -> Criterion:
    """Return the criterion whose index has the fewest jobs to look at, as the query `counts_of` has counted them."""
    candidates = _candidates(criteria)
    if not counts:
        return candidates[0] if candidates else ANY_JOB
    known = zip(counts, candidates, strict=True)
    sizes = [(count if count <= each.max_counted else math.inf, each) for count, each in known]
    # Of what has too many jobs to be sorted, no page can be made.
    usable = [(size, each) for size, each in sizes if each.is_ordered or size < math.inf]
    return min(usable, key=lambda entry: entry[0], default=(0, ANY_JOB))[1]


def _candidates(criteria: Sequence[Criterion]) -> tuple[Criterion, ...]:
    candidates = tuple(criterion for criterion in criteria if criterion.arms)
    return candidates[:1] if candidates and candidates[0].is_best else candidates


@lru_cache(maxsize=1024)
def _counts(criteria: tuple[Criterion, ...]) -> str:
    counts = (
        f"(SELECT count(*) FROM (SELECT 1 FROM ({criterion.examined()}) AS arms LIMIT {limit} + 1) AS found)"
        for criterion in criteria
        for limit in [":counted" if criterion.is_ordered else ":examined"]
    )
    return f"SELECT {', '.join(counts)}"


def _pairs(job_filter: JobFilter) -> list[tuple[JobState, int]]:
    """Return what jobs that match may have as state and stalled."""
    stalled = (0, 1) if job_filter.stalled is None else (int(job_filter.stalled),)
    return [
        (state, value)
        for state in sorted(job_filter.possible_states)
        for value in (stalled if state is JobState.IN_PROGRESS else (0,))
    ]


def _padded_ids(job_filter: JobFilter) -> list[str]:
    """Return the ids, one of them again and again up to a power of two: few queries for all numbers of them."""
    ids = sorted(job_filter.ids)
    return ids + ids[-1:] * ((1 << (len(ids) - 1).bit_length()) - len(ids)) if ids else []


def _prefix_end(prefix: str) -> str | bytes:
    """Return what follows all texts that begin with `prefix`, in the order of code points, which is that of UTF-8."""
    kept = prefix.rstrip("\U0010ffff")
    if not kept:
        return _AFTER_ALL_TEXTS
    following = ord(kept[-1]) + 1
    return kept[:-1] + chr(0xE000 if following == 0xD800 else following)  # surrogates are no characters


@cache
def _by_ids(count: int) -> Criterion:
    condition = f"id IN ({', '.join(f':id{number}' for number in range(count))})"
    return Criterion("jobs INDEXED BY sqlite_autoindex_jobs_1", "key", (condition,), "", is_ordered=False, is_best=True)


@cache
def _by_label(number: int) -> Criterion:
    condition = f"name = :label{number} AND value = :value{number}"
    place = "tenant = :tenant AND created_at = place.created_at AND job_key = place.key"
    return Criterion("labels", "job_key", (condition,), f"EXISTS (SELECT 1 FROM labels WHERE {place} AND {condition})")


@cache
def _by_names(count: int, *, is_indexed: bool) -> Criterion:
    names = [f":name{number}" for number in range(count)]
    arms = tuple(f"name = {name} AND name <> ''" for name in names) if is_indexed and count <= MAX_ARMS else ()
    return Criterion("jobs INDEXED BY jobs_by_name", "key", arms, f"jobs.name IN ({', '.join(names)})")


@cache
def _by_states(count: int) -> Criterion:
    arms = tuple(f"state = :state{number} AND stalled = :stalled{number}" for number in range(count))
    values = ", ".join(f"(:state{number}, :stalled{number})" for number in range(count))
    return Criterion("jobs INDEXED BY jobs_by_state", "key", arms, f"(jobs.state, jobs.stalled) IN (VALUES {values})")


_BY_PARENT = Criterion(
    "jobs INDEXED BY jobs_by_parent",
    "key",
    ("parent_id = :parent_id AND parent_id <> ''",),
    "jobs.parent_id = :parent_id",
)

_BY_PREFIX = Criterion(
    "jobs INDEXED BY jobs_by_name",
    "key",
    ("name >= :prefix AND name < :prefix_end AND name <> ''",),
    "jobs.name >= :prefix AND jobs.name < :prefix_end",
    is_ordered=False,
)

ANY_JOB = _by_states(len(_pairs(JobFilter())))
"""No condition at all: every state, where `parameters_of` has the pairs of a filter without any."""
