"""A replacement for tqdm, whose bars are jobs.

Write `from jobstatus_grpc.tqdm import tqdm, trange` in the place of `from tqdm import tqdm, trange`. The outermost bar
is a job, named by its description; bars within it are its phases. In a task of `jobstatus_grpc.contrib` the bars report
on the job of the task. A bar that is disabled is not reported.
"""

from __future__ import annotations

import atexit
import logging
import sys
import threading
from contextvars import ContextVar
from types import TracebackType
from typing import Any

from jobstatus_grpc.client import JobStatusClient, TrackedJob
from jobstatus_grpc.contrib.task import DEFAULT_END_TIMEOUT_SECONDS, current_job, leave

try:
    from tqdm import std
except ImportError as error:
    raise ImportError("jobstatus_grpc.tqdm needs tqdm: pip install 'jobstatus-grpc[tqdm]'") from error

__all__ = ["tqdm", "trange", "use"]

DEFAULT_NAME = "progress"
"""Of the job of a bar without a description."""

log = logging.getLogger("jobstatus_grpc.contrib")

_client: JobStatusClient | None = None
_problem = ""
"""The last that was logged."""
_making = threading.Lock()


def use(client: JobStatusClient) -> None:
    """Report bars that are made from now on with `client`; without this call, to the server of JOBSTATUS_ADDRESS."""
    global _client
    _client = client


def _client_in_use() -> JobStatusClient:
    global _client
    with _making:
        if _client is None:
            _client = JobStatusClient()
        return _client


def _log_problem(error: Exception) -> None:
    """Log why a bar is not reported, once for all bars with the same problem: a loop may make many."""
    global _problem
    with _making:
        is_known, _problem = str(error) == _problem, str(error)
    if not is_known:
        log.warning("progress bars are not reported: %s", error)


class _Tree:
    """The outermost bar and the bars within it, which share a job."""

    def __init__(self, name: str) -> None:
        self.bars: list[Any] = []
        self._job = current_job()
        self._owned: TrackedJob | None = None
        if self._job is None:
            self._job = self._owned = _client_in_use().track(name)
            self._owned.__enter__()
            atexit.register(self._at_exit)
        else:
            self._job.restart_progress()

    def report(self) -> None:
        """Report where the bars are: each is a part of one step of the bar around it."""
        assert self._job is not None
        bars, part, percent = list(self.bars), 0.0, None
        for bar in reversed(bars):
            percent = 100 * (bar.n + part) / bar.total if bar.total else None
            part = min(percent / 100, 1.0) if percent is not None else 0.0
        self._job.progress(percent, ", ".join(_text_of(bar) for bar in bars))

    def end(self, error: BaseException | None, *, reason: str = "") -> None:
        """End the job, if the bars have one of their own."""
        job, self._owned = self._owned, None
        self.bars = []
        if job is not None:
            atexit.unregister(self._at_exit)
            if reason and error is None:
                job.abort(reason)
            leave(job, error, DEFAULT_END_TIMEOUT_SECONDS)

    def _at_exit(self) -> None:
        # A bar that is neither iterated over nor used as a context manager, and was not closed.
        self.end(getattr(sys, "last_exc", None) or getattr(sys, "last_value", None), reason="the program ended")


def _text_of(bar: Any) -> str:
    count = f"{bar.n}/{bar.total}" if bar.total else str(bar.n)
    description = (bar.desc or "").rstrip(": ")
    return f"{description} {count}" if description else count


_tree: ContextVar[_Tree | None] = ContextVar("jobstatus_grpc.tqdm.tree", default=None)


class tqdm(std.tqdm):  # type: ignore[type-arg]
    """As tqdm's. The end of the outermost bar is SUCCEEDED, FAILED if its `with` block raises, or ABORTED.

    ABORTED is a bar whose loop was left before its end: a bar does not see why.
    """

    _reported: _Tree | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.disable:
            return
        tree = _tree.get()
        if tree is None or not tree.bars:
            try:
                tree = _Tree((self.desc or "").rstrip(": ") or DEFAULT_NAME)
            except Exception as error:
                _log_problem(error)
                return
            _tree.set(tree)
        tree.bars.append(self)
        self._reported = tree
        tree.report()

    def display(self, *args: Any, **kwargs: Any) -> Any:
        """As tqdm's, which calls it every `mininterval` seconds: what is shown is reported."""
        if self._reported is not None:
            self._reported.report()
        return super().display(*args, **kwargs)

    def close(self) -> None:
        """As tqdm's; ends the job of the outermost bar."""
        self._close(None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(error)

    def _close(self, error: BaseException | None) -> None:
        tree, self._reported = self._reported, None
        super().close()
        # By identity: two bars are equal if they are shown in the same place.
        if tree is None or not any(bar is self for bar in tree.bars):
            return
        tree.report()
        if tree.bars[0] is self:
            is_left = self.iterable is not None and self.total is not None and self.n < self.total
            tree.end(error, reason=f"left at {self.n} of {self.total}" if is_left else "")
        else:
            tree.bars = [bar for bar in tree.bars if bar is not self]


def trange(*args: Any, **kwargs: Any) -> Any:
    """As tqdm's: `tqdm(range(*args), **kwargs)`."""
    return tqdm(range(*args), **kwargs)
