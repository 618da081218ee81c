"""The limits of callers: rates, watches, what the file says, by an injected clock."""

from __future__ import annotations

import pytest

from jobstatus_grpc.auth import Identity, Role
from jobstatus_grpc.errors import TooManyWatchersError
from jobstatus_grpc.server import limits
from jobstatus_grpc.server.held_refusals import HOLD_SECONDS
from jobstatus_grpc.server.limits import CallerLimits, LimitRules, Limits, read_limits
from jobstatus_grpc.server.token_bucket import MAX_SPREAD_SECONDS, Rate
from jobstatus_grpc.toml_file import FileError, read_toml

ME = Identity("me", tenant="ci", role=Role.WORKER)


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Counted:
    """CallerLimits with a clock of their own."""

    def __init__(self, **rules):
        self.clock = Clock()
        self.limits = CallerLimits(LimitRules(**rules), clock=self.clock)

    def call(self, caller=ME, updates=0, time_remaining=None):
        """Make a call; return None, or the error and how long it is held."""
        return self.limits.admit(caller, caller.tenant, lambda: updates, lambda: time_remaining)

    def count(self, caller=ME, updates=0):
        """Call until it is refused; return the number of calls before."""
        return next(number for number in range(1000) if self.call(caller, updates) is not None)

    def wait(self, seconds):
        self.clock.now += seconds


def calls(per_second, burst):
    return Limits(calls=Rate(per_second, burst))


def updates(per_second, burst):
    return Limits(updates=Rate(per_second, burst))


def test_a_burst_is_admitted_and_then_as_many_a_second_as_the_limit_says():
    counted = Counted(each_principal=calls(4, 10))
    assert counted.count() == 10
    counted.wait(1)
    assert counted.count() == 4
    counted.wait(3600)
    assert counted.count() == 10


def test_a_refused_call_counts_for_nothing():
    counted = Counted(each_principal=Limits(calls=Rate(1, 100), updates=Rate(1, 1)))
    assert counted.count(updates=1) == 1
    assert counted.count(updates=0) == 99


def test_the_error_says_which_limit_of_what_and_when_there_is_room():
    counted = Counted(each_principal=calls(4, 1))
    counted.call()
    error = counted.call().error
    assert (error.reason, error.metadata) == (
        "TOO_MANY_REQUESTS", {"limit": "calls_per_second", "scope": "principal", "value": "4"},
    )  # fmt: skip
    assert error.retry_after_seconds == 0.25
    counted.wait(0.25)
    assert counted.call() is None


def test_callers_that_are_refused_together_are_asked_to_return_one_by_one():
    counted = Counted(each_principal=calls(4, 1))
    counted.call()
    assert [counted.call().error.retry_after_seconds for _ in range(3)] == [0.25, 0.5, 0.75]


def test_a_batch_larger_than_the_burst_is_admitted_and_leaves_a_debt():
    counted = Counted(each_principal=updates(100, 10))
    assert counted.call(updates=500) is None
    counted.wait(4.9)
    assert counted.call(updates=1) is not None
    counted.wait(0.01)
    assert counted.call(updates=1) is None


def test_a_call_without_updates_takes_none():
    counted = Counted(each_principal=updates(1, 1))
    counted.call(updates=500)
    assert counted.call(updates=0) is None


def test_each_setting_is_from_the_most_specific_table_that_has_it():
    rules = LimitRules(
        each_principal=Limits(calls=Rate(1, 1), updates=Rate(1, 1), watches=1),
        roles={Role.WORKER: Limits(calls=Rate(2, 2), updates=Rate(2, 2))},
        principals={"me": Limits(calls=Rate(3, 3))},
    )
    assert rules.of_principal(ME) == Limits(calls=Rate(3, 3), updates=Rate(2, 2), watches=1)
    assert rules.of_principal(Identity("board", role=Role.WATCHER)) == rules.each_principal


def test_principals_have_buckets_of_their_own_and_share_those_of_their_tenant():
    other, stranger = Identity("other", tenant="ci"), Identity("me", tenant="qa")
    counted = Counted(each_principal=calls(1, 3), tenants={"ci": calls(1, 5)})
    assert [counted.count(), counted.count(other), counted.count(stranger)] == [3, 2, 3]
    assert counted.call(other).error.metadata["scope"] == "tenant"


def test_new_rules_keep_what_is_used():
    counted = Counted(each_principal=calls(1, 10))
    assert counted.count() == 10
    counted.limits.rules = LimitRules(each_principal=calls(5, 20))
    assert counted.count() == 0
    counted.wait(1)
    assert counted.count() == 5


def test_a_limit_of_one_watch_is_in_the_singular():
    counted = Counted(each_principal=Limits(watches=1))
    counted.limits.begin_watch(ME, ME.tenant)
    with pytest.raises(TooManyWatchersError, match=r"has reached its limit of 1 open watch\. End some"):
        counted.limits.begin_watch(ME, ME.tenant)


def test_watches_are_counted_until_their_end_also_before_there_was_a_limit():
    counted = Counted()
    counted.limits.begin_watch(ME, ME.tenant)
    counted.limits.rules = LimitRules(each_principal=Limits(watches=2), each_tenant=Limits(watches=3))
    counted.limits.begin_watch(ME, ME.tenant)
    with pytest.raises(TooManyWatchersError, match="principal me has reached its limit of 2 open watches"):
        counted.limits.begin_watch(ME, ME.tenant)
    counted.limits.end_watch(ME, ME.tenant)
    counted.limits.begin_watch(ME, ME.tenant)
    other = Identity("other", tenant="ci")
    counted.limits.begin_watch(other, other.tenant)
    with pytest.raises(TooManyWatchersError, match="tenant ci has reached its limit of 3 open watches"):
        counted.limits.begin_watch(other, other.tenant)


def test_what_is_used_is_forgotten_only_once_that_makes_no_difference(monkeypatch):
    monkeypatch.setattr(limits, "MAX_USAGES", 100)
    counted = Counted(each_principal=calls(1, 2), principals={"me": calls(0.001, 2)})
    counted.limits._sweep_at = 100
    counted.count()
    for number in range(10_000):
        counted.wait(0.01)
        counted.call(Identity(f"p{number}"))
    assert len(counted.limits._usages) < 2000
    assert counted.call() is not None


def test_a_caller_is_logged_once_a_minute(caplog):
    counted = Counted(each_principal=calls(1, 1))
    for _ in range(3):
        assert counted.count() <= 1
        counted.wait(30)
    begin = "the principal me has reached its limit of 1 call a second: calls beyond it are refused, "
    assert [record.getMessage() for record in caplog.records] == [
        f"{begin}{count} since the last such line" for count in (1, 2)
    ]


def test_only_refusals_of_callers_that_do_not_wait_are_held():
    counted = Counted(each_principal=calls(10, 1))
    counted.call()
    waited = []
    for _ in range(100):
        refusal = counted.call()
        waited.append(refusal.hold_seconds)
        assert refusal.hold_seconds + refusal.error.retry_after_seconds <= MAX_SPREAD_SECONDS + 0.2
    assert waited[:9] == [0.0] * 9
    assert all(HOLD_SECONDS <= seconds <= 2 * HOLD_SECONDS for seconds in waited[10:])


def test_a_refusal_is_held_for_half_of_the_time_until_the_deadline_at_most():
    counted = Counted(each_principal=calls(1, 1))
    for _ in range(3):
        counted.call()
    refusal = counted.call(time_remaining=0.2)
    assert refusal.hold_seconds == pytest.approx(0.1)
    assert refusal.error.retry_after_seconds == pytest.approx(2.9)


@pytest.fixture
def read(tmp_path):
    def read(text):
        path = tmp_path / "auth.toml"
        path.write_text(text)
        return read_toml(str(path), {"limits": read_limits})["limits"]

    return read


def test_the_file_has_limits_of_principals_roles_and_tenants(read):
    rules = read(
        "[limits]\ncalls_per_second = 10\nwatches = 5\n"
        "[limits.roles.worker]\nupdates_per_second = 20\nupdates_burst = 500\n"
        '[limits.principals."spiffe://x/y"]\ncalls_per_second = "unlimited"\n'
        "[limits.each_tenant]\njobs = 1000\n"
        '[limits.tenants.ci]\njobs = "unlimited"\nwatches = 7\n'
    )
    assert rules.each_principal == Limits(calls=Rate(10, 10), watches=5)
    assert rules.of_principal(ME).updates == Rate(20, 500)
    assert (rules.max_jobs("qa"), rules.max_jobs("ci"), rules.of_tenant("ci").watches) == (1000, None, 7)
    unlimited = Counted(principals=rules.principals, each_principal=rules.each_principal)
    assert all(unlimited.call(Identity("spiffe://x/y")) is None for _ in range(1000))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[limits]\ncalls = 1", "line 2: limits.calls: there is no such setting; did you mean calls_burst?"),
        ("[limits]\ncalls_per_second = 0", "line 2: limits.calls_per_second: must be a whole number from 1 to"),
        ("[limits]\ncalls_per_second = 1.5", "line 2: limits.calls_per_second: must be a whole number from 1 to"),
        ('[limits]\nwatches = "many"', "line 2: limits.watches: must be a whole number"),
        ("[limits]\njobs = 1", "line 2: limits.jobs: there is no such setting"),
        ("[limits]\ncalls_burst = 5", "line 2: limits.calls_burst: has no effect without calls_per_second"),
        ("[limits.roles.boss]\nwatches = 1", "limits.roles.boss: 'boss' is no role; there are: watcher, worker"),
        ("[limits.principals.me]\njobs = 1", "line 2: limits.principals.me.jobs: there is no such setting"),
        ("[limits.tenants]\njobs = 1", "line 2: limits.tenants.jobs: must be a table"),
    ],
)
def test_a_wrong_limit_is_an_error_that_names_the_line(read, text, says):
    with pytest.raises(FileError) as caught:
        read(text)
    assert says in str(caught.value)
