"""The numbers of children in the events of watches.

The feed has no changes of these numbers: a commit of a child must not write to its parent. It has the child's change,
and that is when the parent is read, once for all changes of its children in one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from jobstatus_grpc.job import NO_CHILDREN, with_children
from jobstatus_grpc.stores.interface import Change, JobStore, Key


class Numbered(NamedTuple):
    """A batch of changes with the numbers of children as they were read after it."""

    changes: Sequence[Change]
    parents: Sequence[Change]
    """The open parents of jobs in the batch, as they are now: they have not changed but in these numbers, if at all."""


async def read_numbers(
    store: JobStore,
    changes: Sequence[Change],
    *,
    is_watched: Callable[[Key], bool],
    is_parent_watched: Callable[[Key], bool],
) -> Numbered:
    """Return changes with the numbers of children, of the jobs that are watched.

    Raises:
        StoreUnavailableError: they cannot be read now.
    """
    changed = {key for change in changes if change.job is not None and is_watched(key := (change.tenant, change.id))}
    parents = {
        key
        for change in changes
        if (job := change.known_job) is not None
        and job.parent_id
        and is_parent_watched(key := (change.tenant, job.parent_id))
    }
    if changed and (children := await store.children(changed)):
        changes = [
            change
            if change.job is None
            else change._replace(job=with_children(change.job, children.get((change.tenant, change.id), NO_CHILDREN)))
            for change in changes
        ]
    if not parents:
        return Numbered(changes, ())
    jobs = await store.jobs(parents)
    return Numbered(changes, [Change(*key, job.revision, job) for key, job in jobs.items() if not job.done])
