"""The tree of a job, its children, their children and so on, as `tree` and `watch --tree` draw it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from jobstatus_grpc.cli import output
from jobstatus_grpc.cli.text import one_line
from jobstatus_grpc.job import JobFilter, limits

if TYPE_CHECKING:
    from rich.text import Text

    from jobstatus_grpc.client import JobStatusClient
    from jobstatus_grpc.job import Job

MAX_JOBS = 200
"""Jobs of a tree that are read and drawn, unless --limit says otherwise; the others are counted."""

MAX_JSON_LEVELS = 100
"""Levels of a tree in JSON, each of which is an object in an array: parsers refuse what is deeper, that of Python at
about 1,000 and that of jq 1.6 at 256."""


class Row(NamedTuple):
    """One line of a drawing."""

    branches: str
    """The lines that lead to the job from the left."""
    job: Job | None
    """None: the children of a job that are not drawn."""
    left_out: int = 0
    """The number of those."""

    @property
    def text(self) -> str:
        """The line without colours."""
        if self.job is None:
            return f"{self.branches}… {self.left_out:,} more"
        return self.branches + "  ".join(part for part in (output.state_words(self.job), *_details(self.job)) if part)

    @property
    def styled(self) -> Text:
        """The line in colours, for a terminal."""
        from rich.text import Text

        from jobstatus_grpc.cli import tables

        if self.job is None:
            return Text(self.text, style="dim")
        text = Text(self.branches, style="dim", no_wrap=True, overflow="ellipsis")
        text.append(output.state_words(self.job), style=tables.STYLES[self.job.state])
        return text.append("".join(f"  {part}" for part in _details(self.job) if part), style="default")


def _details(job: Job) -> list[str]:
    is_of_children = job.progress is None and job.children_progress is not None
    progress = job.children_progress if is_of_children else job.progress
    return [
        "" if progress is None or job.done else f"{'children ' * is_of_children}{output.percent(progress)}",
        one_line(job.name),
        job.id,
        one_line(output.why(job)),
    ]


class JobTree:
    """Jobs by their parents, at most `limit`. A job that is its own descendant is drawn once."""

    def __init__(self, root: Job, *, limit: int = MAX_JOBS) -> None:
        self.root_id = root.id
        self._limit = limit
        self._jobs = {root.id: root}
        self._children: dict[str, dict[str, None]] = {}

    @property
    def room(self) -> int:
        """The number of jobs that can be added."""
        return self._limit - len(self._jobs)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._jobs

    def put(self, job: Job) -> bool:
        """Add a job or its newer state; return False if there is no room for it."""
        known = self._jobs.get(job.id)
        if known is None and self.room <= 0:
            return False
        if job.id != self.root_id and (known is None or known.parent_id != job.parent_id):
            if known is not None:  # it was deleted, and created again below another job
                self._children[known.parent_id].pop(job.id, None)
            self._children.setdefault(job.parent_id, {})[job.id] = None
        self._jobs[job.id] = job
        return True

    def remove(self, job_id: str) -> None:
        """Remove a job that was deleted; its children are not drawn any more."""
        job = self._jobs.get(job_id)
        if job is not None and job_id != self.root_id:
            del self._jobs[job_id]
            self._children.get(job.parent_id, {}).pop(job_id, None)

    @property
    def root(self) -> Job:
        """The job at the root, in its newest state."""
        return self._jobs[self.root_id]

    def rows(self) -> list[Row]:
        """Return the lines of the drawing, children below their parents in the order of creation."""
        rows: list[Row] = []
        stack = [(Row("", self.root), "")]
        while stack:
            row, below = stack.pop()
            rows.append(row)
            if row.job is None:
                continue
            children, left_out = self._children_of(row.job)
            lines: list[Job | None] = [*children, *([None] if left_out else [])]
            for number, child in reversed(list(enumerate(lines, start=1))):
                is_last = number == len(lines)
                branch, continued = ("└─ ", "   ") if is_last else ("├─ ", "│  ")
                stack.append((Row(below + branch, child, 0 if child else left_out), below + continued))
        return rows

    def to_object(self) -> dict[str, Any]:
        """Return the tree for JSON: the job, its children in the same form, and the number of those left out.

        The children of jobs at level MAX_JSON_LEVELS are left out.
        """
        return self._object_of(self.root, MAX_JSON_LEVELS)

    def _object_of(self, job: Job, levels: int) -> dict[str, Any]:
        children, left_out = self._children_of(job)
        if levels == 1:
            children, left_out = [], left_out + len(children)
        return {
            "job": output.to_object(job),
            "children": [self._object_of(child, levels - 1) for child in children],
            "leftOut": left_out,
        }

    def _children_of(self, parent: Job) -> tuple[list[Job], int]:
        """Return the children that are drawn below a job, and the number of the others."""
        known = [self._jobs.get(child_id) for child_id in list(self._children.get(parent.id, ()))]
        children = sorted((job for job in known if job), key=lambda job: (job.created_at, job.id))
        of_circle = self.root.parent_id == parent.id  # the root is drawn already
        return children, max(sum(parent.children.values()) - len(children) - of_circle, 0)


def read_tree(client: JobStatusClient, root_id: str, *, limit: int) -> JobTree:
    """Return a job with at most `limit` jobs of those below it, level by level, the newest children of each."""
    root = client.get(root_id)
    found = JobTree(root, limit=limit)
    parents = deque([root] if root.children else [])
    while parents and found.room > 0:
        parent, token = parents.popleft().id, ""
        while found.room > 0:
            size = min(found.room, limits.MAX_PAGE_SIZE)
            page = client.list(JobFilter(parent_id=parent), page_size=size, page_token=token)
            for job in page.jobs:
                is_new = job.id not in found
                if is_new and found.put(job) and job.children:
                    parents.append(job)
            token = page.next_page_token
            if not token:
                break
    return found


def draw_live(states: Iterable[object], tree: JobTree, when_interrupted: Callable[[], BaseException]) -> None:
    """Draw the tree on a terminal again and again until `states` ends, as much as fits; then all of it."""
    from rich.console import Group, RenderableType
    from rich.live import Live
    from rich.text import Text

    from jobstatus_grpc.cli.bars import NarrowConsole

    console = NarrowConsole()
    is_over = False

    def render() -> RenderableType:
        rows = tree.rows()
        room = len(rows) if is_over else max(console.height - 2, 1)
        more = len(rows) - room
        lines = [row.styled for row in rows[:room]]
        return Group(*lines, *([Text(f"… and {more:,} more lines", style="dim")] if more > 0 else []))

    try:
        with Live(console=console, refresh_per_second=10, get_renderable=render):
            for _ in states:
                pass
            is_over = True
    except KeyboardInterrupt:
        raise when_interrupted() from None
