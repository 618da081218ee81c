"""What a shell offers for the word that is being typed. Whatever goes wrong offers nothing, and says nothing."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from jobstatus_grpc import limits
from jobstatus_grpc.state import JobState

if TYPE_CHECKING:
    import click
    from click.shell_completion import CompletionItem

    from jobstatus_grpc.record import Job

MOST = 50
PATIENCE_SECONDS = 1.0


def states(among: Iterable[JobState]) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    """Return what offers those of these states that begin as what is typed."""
    words = [state.word for state in sorted(among)]

    def offer(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return _offer((word, "") for word in words if word.startswith(incomplete.lower()))

    return offer


def job_ids(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the newest jobs whose ids begin so, as far as they come in time."""
    # grpc's C core tells stderr of servers that it does not reach.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    found: list[Job] = []
    with contextlib.suppress(Exception):  # a traceback would land in the middle of the line that is being typed
        found.extend(itertools.islice(_newest_jobs(ctx, incomplete), MOST))
    return _offer((job.id, f"{job.name} {job.state.word}".strip()) for job in found)


def _newest_jobs(ctx: click.Context, prefix: str) -> Iterator[Job]:
    from jobstatus_grpc.client import JobStatusClient

    deadline = time.monotonic() + PATIENCE_SECONDS
    where = {name: ctx.params[name] for name in ("address", "token", "ca_file", "cert_file", "key_file")}
    with JobStatusClient(**where) as client:
        token = ""
        while (left := deadline - time.monotonic()) > 0:
            # No filter of the service knows how an id begins.
            page = client.list(
                page_size=limits.MAX_PAGE_SIZE if prefix else MOST, page_token=token, timeout_seconds=left
            )
            yield from (job for job in page.jobs if job.id.startswith(prefix))
            token = page.next_page_token
            if not token:
                return


def _offer(values: Iterable[tuple[str, str]]) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    return [CompletionItem(value, help=text or None) for value, text in values]
