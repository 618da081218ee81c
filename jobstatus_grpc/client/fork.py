"""What a forked child does with the clients, tracked jobs and reporters that it inherits.

Only the thread that forked lives on in the child. Locks may be held by threads that no longer exist, and connections
belong to the parent: the child makes its own.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

Inherited = TypeVar("Inherited")

_inheritable: weakref.WeakKeyDictionary[Any, Callable[[Any], object]] = weakref.WeakKeyDictionary()


def renew_in_children(inherited: Inherited, renew: Callable[[Inherited], object]) -> None:
    """In each forked child that inherits an object, call `renew` with it; it must not refer to the object itself."""
    _inheritable[inherited] = renew


def keep_for_ever(parents: object) -> None:
    """Never free an object of the parent: a channel or a call that is freed sends on the parent's connection."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(parents))


def renewed(event: threading.Event) -> threading.Event:
    """Return a new event in the state of one that threads of the parent may have been using."""
    new = threading.Event()
    if event.is_set():
        new.set()
    return new


MAX_FORK_PAUSE_SECONDS = 0.1
"""How long a fork waits for the calls of background threads: far longer than calls take, unless no server answers."""


class _BackgroundCalls:
    """Keeps forks and the calls of background threads apart.

    A thread that begins or ends a call holds locks of gRPC. In a child that is forked then, gRPC itself would wait for
    them for ever. A call that waits for its answer holds none.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()  # reentrant: a signal handler may fork
        self._calls = 0
        self._forks = 0

    def __enter__(self) -> None:
        with self._changed:
            while self._forks:
                self._changed.wait()
            self._calls += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._calls -= 1
            self._changed.notify_all()

    def before_fork(self) -> None:
        with self._changed:
            self._forks += 1
            self._changed.wait_for(lambda: self._calls == 0, MAX_FORK_PAUSE_SECONDS)

    def after_fork_in_parent(self) -> None:
        with self._changed:
            self._forks -= 1
            self._changed.notify_all()


background_call = _BackgroundCalls()
"""`with background_call:` around a call that a thread makes by itself, so that the program cannot know when to fork."""


def _after_fork() -> None:
    background_call.__init__()  # type: ignore[misc]
    for inherited, renew in list(_inheritable.items()):
        renew(inherited)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=background_call.before_fork,
        after_in_parent=background_call.after_fork_in_parent,
        after_in_child=_after_fork,
    )
