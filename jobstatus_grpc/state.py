"""The states of a job, and which may follow which."""

from __future__ import annotations

import enum
from collections.abc import Mapping


class JobState(enum.IntEnum):
    """Where a job stands. The numbers are stored and never change."""

    PENDING = 1
    """Accepted. CreateJob puts it here; a worker's claim moves it on."""
    IN_PROGRESS = 2
    """A worker is on it. Its updates, or a new claim after its death, move it on."""
    RETRYING = 3
    """An attempt failed and its worker said that another follows; the next claim begins it."""
    SUCCEEDED = 4
    """Done, well."""
    ABORTED = 5
    """Done, stopped by the system or an operator."""
    FAILED = 6
    """Done, badly; no attempt follows."""
    CANCELLED = 7
    """Done, because CancelJob asked."""

    @property
    def is_terminal(self) -> bool:
        """Whether a job in this state is done and never changes again."""
        return self in TERMINAL_STATES

    @property
    def word(self) -> str:
        """The state in lower case, as people type it: `in_progress`."""
        return self.name.lower()


_PENDING, _IN_PROGRESS, _RETRYING, _SUCCEEDED, _ABORTED, _FAILED, _CANCELLED = JobState
TERMINAL_STATES = frozenset({_SUCCEEDED, _ABORTED, _FAILED, _CANCELLED})
CREATION_STATES = frozenset({_PENDING, _IN_PROGRESS})
ERROR_STATES = frozenset({_RETRYING, _ABORTED, _FAILED, _CANCELLED})

TRANSITIONS: Mapping[JobState, frozenset[JobState]] = {
    _PENDING: frozenset({_PENDING, _IN_PROGRESS, _SUCCEEDED, _ABORTED, _FAILED, _CANCELLED}),
    _IN_PROGRESS: frozenset({_IN_PROGRESS, _RETRYING, _SUCCEEDED, _ABORTED, _FAILED, _CANCELLED}),
    _RETRYING: frozenset({_IN_PROGRESS, _RETRYING, _ABORTED, _FAILED, _CANCELLED}),
    **{state: frozenset() for state in (_SUCCEEDED, _ABORTED, _FAILED, _CANCELLED)},
}
"""Where an update may move a job; a state among its own means "stays". Once a cancel was requested, a job moves only
to a terminal state or stays."""
