"""The two clients have the same methods and signatures."""

from __future__ import annotations

import inspect

import pytest

from jobstatus_grpc import (
    AsyncJobStatusClient,
    AsyncJobsWatch,
    AsyncReporter,
    AsyncTrackedJob,
    AsyncWatch,
    JobStatusClient,
    JobsWatch,
    JobUpdate,
    Reporter,
    TrackedJob,
    Watch,
)
from tests.support import generate_sync


def public(cls: type) -> dict[str, object]:
    return {name: member for name, member in inspect.getmembers(cls) if not name.startswith("_") or name == "__init__"}


def parameters(function: object) -> list[inspect.Parameter]:
    assert callable(function)
    return list(inspect.signature(function).parameters.values())


def test_the_sync_client_is_generated_from_the_asyncio_one():
    expected = generate_sync.generate(generate_sync.SOURCE.read_text())
    assert generate_sync.TARGET.read_text() == expected, "sync.py is stale: run make sync"


METHODS = sorted(public(AsyncJobStatusClient))


def test_both_clients_have_the_same_methods():
    assert sorted(public(JobStatusClient)) == METHODS


@pytest.mark.parametrize("name", METHODS)
def test_a_method_takes_the_same_arguments_in_both(name):
    assert parameters(public(JobStatusClient)[name]) == parameters(public(AsyncJobStatusClient)[name])


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_documented_and_in_the_same_words(name):
    documented = inspect.getdoc(public(AsyncJobStatusClient)[name])
    assert documented
    assert inspect.getdoc(public(JobStatusClient)[name]) == documented


@pytest.mark.parametrize("name", METHODS)
def test_a_method_returns_the_same_in_both(name):
    clients = (AsyncJobStatusClient, JobStatusClient)
    returned = [str(inspect.signature(getattr(cls, name)).return_annotation) for cls in clients]
    assert returned[0].removeprefix("Async") == returned[1]


def test_tracked_jobs_are_used_alike():
    assert public(AsyncTrackedJob).keys() == public(TrackedJob).keys()


@pytest.mark.parametrize("name", [name for name in public(AsyncTrackedJob) if name != "__init__"])
def test_a_tracked_jobs_members_are_alike_and_documented_in_the_same_words(name):
    aio, sync = public(AsyncTrackedJob)[name], public(TrackedJob)[name]
    assert inspect.getdoc(aio)
    assert inspect.getdoc(sync) == inspect.getdoc(aio)
    if inspect.isfunction(aio):
        assert parameters(sync) == parameters(aio)


@pytest.mark.parametrize(("aio", "sync"), [(AsyncWatch, Watch), (AsyncJobsWatch, JobsWatch)])
def test_watches_are_used_alike(aio, sync):
    assert {name.replace("aclose", "close") for name in public(aio)} == set(public(sync))


def test_reporters_are_used_alike():
    assert public(AsyncReporter).keys() == public(Reporter).keys()
    assert parameters(AsyncReporter.flush) == parameters(Reporter.flush)
    assert inspect.getdoc(AsyncReporter.flush) == inspect.getdoc(Reporter.flush)


@pytest.mark.parametrize("update", [AsyncReporter.update, AsyncJobStatusClient.update], ids=["reporter", "client"])
def test_an_update_takes_the_same_arguments_everywhere(update):
    names = [parameter.name for parameter in parameters(JobUpdate)]
    taken = [parameter.name for parameter in parameters(update)]
    assert [name for name in taken if name not in ("self", "timeout_seconds")] == names
