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


def _after_fork() -> None:
    for inherited, renew in list(_inheritable.items()):
        renew(inherited)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
