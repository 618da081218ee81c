"""The children of a job in numbers, which stores keep beside the jobs: what a child adds, and what the parent shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from jobstatus_grpc.job.model import Job, JobState, evolve

Children: TypeAlias = Mapping[int, int]
"""The number of children by state, and under PROGRESS the sum of their progress; or what a change adds to these."""

PROGRESS = 0
"""Counted beside the states, which begin at 1: the progress of all children, in millionths of a percent. Whole numbers,
so that a sum of many differences is exact."""

MILLIONTHS = 1_000_000

NO_CHILDREN: Children = {}

ShownNumbers: TypeAlias = tuple[Mapping[str, int], float | None]
"""`children` and `children_progress` of a job."""

NO_NUMBERS: ShownNumbers = ({}, None)


def progress_of_child(job: Job) -> int:
    """Return what a child adds under PROGRESS: 100 % if it is done, 0 if its progress is not known."""
    return 100 * MILLIONTHS if job.done else int((job.progress or 0.0) * MILLIONTHS)


def add_children(children: Children, change: Children) -> Children:
    """Return the numbers after a change, without those that are 0."""
    numbers = dict(children)
    for state, number in change.items():
        numbers[state] = numbers.get(state, 0) + number
    return {state: number for state, number in numbers.items() if number}


def with_children(job: Job, children: Children) -> Job:
    """Return the job with `children` and `children_progress` set from these numbers.

    Numbers that are too small, as where a process of an old version has written children, are shown as 0.
    """
    if not children and not job.children:
        return job
    counts = {state.word: number for state in JobState if (number := children.get(state, 0)) > 0}
    mean = min(max(children.get(PROGRESS, 0) / MILLIONTHS / sum(counts.values()), 0.0), 100.0) if counts else None
    return evolve(job, {"children": counts, "children_progress": mean})


def shown_numbers(job: Job) -> ShownNumbers:
    """Return the numbers of children that a job shows; they change without its revision."""
    return (job.children, job.children_progress)
