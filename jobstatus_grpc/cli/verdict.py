"""How a command ended → how its job ends."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from jobstatus_grpc.state import JobState


@dataclass(frozen=True, slots=True)
class Verdict:
    """The end of a job; message and reason are its error's, for people and for machines."""

    state: JobState
    message: str = ""
    reason: str = ""


def judge(
    code: int,
    *,
    was_stopped: bool = False,
    interrupted_by: signal.Signals | None = None,
    last_line: str = "",
    lost_output: str = "",
) -> Verdict:
    """Return what the end of a command means.

    Args:
        code: its exit code, negative where a signal ended it.
        was_stopped: it was told to end because the job was to.
        interrupted_by: the signal by which a person or the system ended it.
        last_line: the last line of its stderr.
        lost_output: why some of its output went nowhere; without us it would have met that error itself.
    """
    if was_stopped:
        return Verdict(JobState.CANCELLED)
    if code == 0 and lost_output:
        return Verdict(JobState.FAILED, lost_output, "OUTPUT_LOST")
    if code == 0:
        return Verdict(JobState.SUCCEEDED)
    if interrupted_by is not None:
        return Verdict(JobState.ABORTED, f"interrupted by {interrupted_by.name}")
    if code < 0:
        killer = f"killed by {_name(-code)}"
        return Verdict(JobState.FAILED, f"{killer}: {last_line}" if last_line else killer, f"KILLED_BY_{_name(-code)}")
    return Verdict(JobState.FAILED, last_line or f"exit code {code}", f"EXIT_CODE_{code}")


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIGNAL_{number}"
