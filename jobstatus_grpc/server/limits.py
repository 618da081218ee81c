"""Limits of callers, the section [limits] of the auth file: rates of calls and updates, open watches, jobs kept.

Each principal has buckets of its own, and all callers of a tenant share those of the tenant. A call of an admin
in another tenant counts for the admin as every call, and for that tenant.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields

from jobstatus_grpc.auth import Identity, Role
from jobstatus_grpc.auth.stanzas import ROLES
from jobstatus_grpc.errors import ResourceExhaustedError, TooManyJobsError, TooManyRequestsError, TooManyWatchersError
from jobstatus_grpc.server.auth_file import AuthFile
from jobstatus_grpc.server.held_refusals import HeldCount, hold_seconds
from jobstatus_grpc.server.token_bucket import Rate, TokenBucket
from jobstatus_grpc.toml_file import Value

log = logging.getLogger("jobstatus_grpc.server")

SECTION = "limits"

UNLIMITED = "unlimited"
"""In the file: no limit, where a more general table has one."""

MAX_PER_SECOND = 1_000_000

MAX_COUNT = 1_000_000_000

HOLD_FROM_SECONDS = 1.0
"""A call is refused at once if it is asked to return sooner than this; callers that heed that are never held. Other
refusals are held: see HeldRefusals."""

LOG_AGAIN_SECONDS = 60.0
"""Between two log lines about the same caller or tenant, at least."""

MAX_USAGES = 10_000
"""Callers and tenants that are remembered before idle ones are forgotten; each takes about 700 bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The settings of one table; None: not set, infinite: unlimited."""

    calls: Rate | None = None
    updates: Rate | None = None
    """Creations, updates, cancellations and deletions; a batch counts its updates."""
    watches: float | None = None
    jobs: float | None = None

    def over(self, other: Limits) -> Limits:
        """Return these settings, and those of `other` where they are not set."""
        return Limits(**{
            each.name: getattr(other, each.name) if (mine := getattr(self, each.name)) is None else mine
            for each in fields(self)
        })  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitRules:
    """The section [limits]. Without one nothing is limited."""

    each_principal: Limits = Limits()
    roles: Mapping[Role, Limits] = field(default_factory=dict)
    principals: Mapping[str, Limits] = field(default_factory=dict)
    each_tenant: Limits = Limits()
    tenants: Mapping[str, Limits] = field(default_factory=dict)

    def of_principal(self, caller: Identity) -> Limits:
        """Return the limits of one caller: each is from the most specific table that sets it."""
        own, of_role = self.principals.get(caller.principal, Limits()), self.roles.get(caller.role, Limits())
        return own.over(of_role).over(self.each_principal)

    def of_tenant(self, tenant: str) -> Limits:
        """Return the limits of all callers of a tenant together."""
        return self.tenants.get(tenant, Limits()).over(self.each_tenant)

    def max_jobs(self, tenant: str) -> int | None:
        """Return how many jobs the tenant may have; None: any number."""
        jobs = self.of_tenant(tenant).jobs
        return None if jobs is None or math.isinf(jobs) else int(jobs)


_OF_PRINCIPALS = ("calls_per_second", "calls_burst", "updates_per_second", "updates_burst", "watches")

_OF_TENANTS = (*_OF_PRINCIPALS, "jobs")


def read_limits(section: Value) -> LimitRules:
    """Read the section [limits]."""
    parts = ("roles", "principals", "each_tenant", "tenants")
    table = section.table(optional=(*_OF_PRINCIPALS, *parts))
    roles, principals, tenants = (
        table[name].entries() if name in table else {} for name in parts if "each" not in name
    )
    for word, value in roles.items():
        if word not in ROLES:
            value.refuse(f"{word!r} is no role; there are: {', '.join(ROLES)}")
    return LimitRules(
        each_principal=_read_table({name: value for name, value in table.items() if name not in parts}),
        roles={ROLES[word]: _read_table(value.table(optional=_OF_PRINCIPALS)) for word, value in roles.items()},
        principals={name: _read_table(value.table(optional=_OF_PRINCIPALS)) for name, value in principals.items()},
        each_tenant=_read_table(table["each_tenant"].table(optional=_OF_TENANTS) if "each_tenant" in table else {}),
        tenants={name: _read_table(value.table(optional=_OF_TENANTS)) for name, value in tenants.items()},
    )


def _read_table(table: Mapping[str, Value]) -> Limits:
    return Limits(
        calls=_read_rate(table, "calls"),
        updates=_read_rate(table, "updates"),
        watches=_read_number(table["watches"], MAX_COUNT) if "watches" in table else None,
        jobs=_read_number(table["jobs"], MAX_COUNT) if "jobs" in table else None,
    )


def _read_rate(table: Mapping[str, Value], what: str) -> Rate | None:
    rate, burst = f"{what}_per_second", f"{what}_burst"
    if rate not in table:
        if burst in table:
            table[burst].refuse(f"has no effect without {rate}; add it to this table")
        return None
    per_second = _read_number(table[rate], MAX_PER_SECOND)
    return Rate(per_second, _read_number(table[burst], MAX_COUNT) if burst in table else per_second)


def _read_number(value: Value, largest: int) -> float:
    return math.inf if value.plain() == UNLIMITED else value.number(smallest=1, largest=largest)


NO_RULES = LimitRules()


def _rules_in(file: AuthFile) -> LimitRules:
    rules: LimitRules = file.contents.get(SECTION, NO_RULES)
    return rules


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a call is over a limit."""

    error: ResourceExhaustedError
    hold_seconds: float
    """Time after which to send the error."""
    held: HeldCount
    """Of the caller's refusals."""


CALLS, UPDATES, WATCHES, JOBS = "calls_per_second", "updates_per_second", "watches", "jobs"

PRINCIPAL, TENANT = "principal", "tenant"


class _Usage:
    """What one principal, or all callers of one tenant, use."""

    def __init__(self, scope: str, name: str) -> None:
        self.scope = scope
        self.name = name
        self.limits = Limits()
        self.rules: LimitRules | None = None
        """The rules that `limits` follow from."""
        self.watches = 0
        self.calls: TokenBucket | None = None
        self.updates: TokenBucket | None = None
        self.held = HeldCount()
        self._logged_at = -math.inf
        self._refused = 0

    def change(self, limits: Limits, rules: LimitRules, now: float) -> None:
        """Take other limits, and keep what is used."""
        self.limits, self.rules = limits, rules
        self.calls = _changed(self.calls, limits.calls, now)
        self.updates = _changed(self.updates, limits.updates, now)

    def bucket(self, limit: str) -> TokenBucket | None:
        """Return the bucket of CALLS or UPDATES; None: there is no limit."""
        return self.calls if limit == CALLS else self.updates

    def is_idle(self, now: float) -> bool:
        """Return whether nothing is lost if this is forgotten."""
        return not self.watches and all(b is None or b.is_full(now) for b in (self.calls, self.updates))

    def note_refusal(self, what: str, now: float) -> None:
        """Log a refusal, unless one was logged a short time ago."""
        self._refused += 1
        if now - self._logged_at >= LOG_AGAIN_SECONDS:
            log.warning("%s: calls beyond it are refused, %d since the last such line", what, self._refused)
            self._logged_at, self._refused = now, 0


def _changed(bucket: TokenBucket | None, rate: Rate | None, now: float) -> TokenBucket | None:
    if rate is None or math.isinf(rate.per_second):
        return None
    if bucket is None:
        return TokenBucket(rate, now)
    bucket.change(rate, now)
    return bucket


class CallerLimits:
    """Counts what callers use, and refuses what is beyond their limits. For one event loop."""

    def __init__(self, rules: LimitRules, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.rules = rules
        """Replaced when the file changes: what is used stays counted."""
        self.refusals: Counter[tuple[str, str]] = Counter(
            {
                (JOBS, TENANT): 0,
                **{(limit, scope): 0 for limit in (CALLS, UPDATES, WATCHES) for scope in (PRINCIPAL, TENANT)},
            }
        )
        """Refused calls, by the name of the limit and its scope."""
        self._now = clock
        self._usages: dict[tuple[object, ...], _Usage] = {}
        """By tenant, principal and role, and by tenant alone."""
        self._sweep_at = MAX_USAGES

    @classmethod
    def following(cls, file: AuthFile) -> CallerLimits:
        """Return limits with the rules that are in `file`, whenever they change."""
        limits = cls(_rules_in(file))

        def change() -> None:
            limits.rules = _rules_in(file)

        file.on_change(change)
        return limits

    def admit(
        self,
        caller: Identity,
        tenant: str,
        count_updates: Callable[[], int],
        time_remaining: Callable[[], float | None],
    ) -> Refusal | None:
        """Count a call in a tenant and its updates, or return why it is refused; then it counts for nothing.

        Args:
            caller: in its own tenant, here and below.
            tenant: the one that the call is for.
            count_updates: returns the number of updates that the call asks for.
            time_remaining: returns the seconds left until the call's deadline; None: it has none.
        """
        if self.rules is NO_RULES:
            return None
        now = self._now()
        usages = self._usages_of(caller, tenant, now)
        taken: list[tuple[TokenBucket, int]] = []
        # Updates last: to count those of a batch takes time.
        for limit, count_of in ((CALLS, _one), (UPDATES, count_updates)):
            buckets = [(usage, bucket) for usage in usages if (bucket := usage.bucket(limit)) is not None]
            if not buckets or not (count := count_of()):
                continue
            for usage, bucket in buckets:
                if bucket.seconds_until_room(now) > 0:
                    return self._refuse_rate(limit, usage, bucket, count, now, time_remaining())
                taken.append((bucket, count))
        for bucket, count in taken:
            bucket.take(count)
        return None

    def _refuse_rate(
        self, limit: str, usage: _Usage, bucket: TokenBucket, count: int, now: float, time_remaining: float | None
    ) -> Refusal:
        self.refusals[limit, usage.scope] += 1
        seconds = bucket.promise(count, now)
        held_seconds = hold_seconds(usage.held, time_remaining) if seconds >= HOLD_FROM_SECONDS else 0.0
        per_second = f"{bucket.rate.per_second:g}"
        what = _reached(usage, per_second, "call" if limit == CALLS else "update") + " a second"
        usage.note_refusal(what, now)
        error = TooManyRequestsError(f"{what}. Try again later", limit=limit, scope=usage.scope, value=per_second)
        error.retry_after_seconds = _in_steps(seconds - held_seconds)
        return Refusal(error, held_seconds, usage.held)

    def begin_watch(self, caller: Identity, tenant: str) -> None:
        """Count a watch in a tenant until `end_watch`.

        Raises:
            TooManyWatchersError: the caller, or the tenant, has as many as it may.
        """
        now = self._now()
        usages = self._usages_of(caller, tenant, now)
        for usage in usages:
            limit = usage.limits.watches
            if limit is not None and usage.watches >= limit:
                self.refusals[WATCHES, usage.scope] += 1
                what = _reached(usage, f"{limit:g}", "open watch", "es")
                usage.note_refusal(what, now)
                text = f"{what}. End some, or try again later"
                raise TooManyWatchersError(text, limit=WATCHES, scope=usage.scope, value=f"{limit:g}")
        for usage in usages:
            usage.watches += 1

    def end_watch(self, caller: Identity, tenant: str) -> None:
        """Count a watch no more."""
        for usage in self._usages_of(caller, tenant, self._now()):
            usage.watches -= 1

    def max_jobs(self, tenant: str) -> int | None:
        """Return how many jobs a tenant may have; None: any number."""
        return self.rules.max_jobs(tenant)

    def refuse_job(self, tenant: str, limit: int) -> TooManyJobsError:
        """Count and log the refusal of a tenant's new job, and return its error."""
        self.refusals[JOBS, TENANT] += 1
        now = self._now()
        usage = self._of_tenant(tenant, now)
        what = _reached(usage, str(limit), "job")
        usage.note_refusal(what, now)
        text = f"{what}. Delete some, or wait until some expire"
        return TooManyJobsError(text, limit=JOBS, scope=TENANT, value=str(limit))

    def _usages_of(self, caller: Identity, tenant: str, now: float) -> tuple[_Usage, _Usage]:
        key = (caller.tenant, caller.principal, caller.role)
        own = self._usages.get(key) or self._add(key, _Usage(PRINCIPAL, caller.principal), now)
        if own.rules is not self.rules:
            own.change(self.rules.of_principal(caller), self.rules, now)
        return own, self._of_tenant(tenant, now)

    def _of_tenant(self, tenant: str, now: float) -> _Usage:
        key = (tenant,)
        usage = self._usages.get(key) or self._add(key, _Usage(TENANT, tenant), now)
        if usage.rules is not self.rules:
            usage.change(self.rules.of_tenant(tenant), self.rules, now)
        return usage

    def _add(self, key: tuple[object, ...], usage: _Usage, now: float) -> _Usage:
        if len(self._usages) >= self._sweep_at:
            self._usages = {key: usage for key, usage in self._usages.items() if not usage.is_idle(now)}
            self._sweep_at = max(2 * len(self._usages), MAX_USAGES)
        self._usages[key] = usage
        return usage


def _reached(usage: _Usage, limit: str, singular: str, ending: str = "s") -> str:
    return f"the {usage.scope} {usage.name} has reached its limit of {limit} {singular}{'' if limit == '1' else ending}"


def _one() -> int:
    return 1


def _in_steps(seconds: float) -> float:
    """Round up, so that few different errors are rendered."""
    per_second = 100 if seconds < 1 else 10
    return max(math.ceil(seconds * per_second), 1) / per_second
