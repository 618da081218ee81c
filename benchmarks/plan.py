"""How much to measure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the command line says about it, and how large the crowds are."""

    repetitions: int = 3
    """In each, all sides take their turns."""
    seconds: float = 2.0
    """Of each load of unary calls; a quarter of it where the number of callers is not the one that is judged."""
    callers: tuple[int, ...] = (1, 4, 16, 64, 256)
    audience: int = 1_000
    """Watchers of one job that see a burst."""
    crowds: tuple[int, ...] = (10, 100, 1_000, 10_000, 20_000)
    """Idle watchers, rising."""
    idle_seconds: float = 30.0
    """Of looking at the largest crowd; a heartbeat comes every 30."""
    followers: int = 10_000
    """Watches of our Python client that live through restarts."""
    jobs: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    changes: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    """Change rows of a thousand jobs."""


SMALL = Plan(
    repetitions=1,
    seconds=0.5,
    callers=(1, 64),
    audience=50,
    crowds=(10, 100),
    idle_seconds=1.0,
    followers=100,
    jobs=(1_000, 3_000),
    changes=(1_000, 3_000),
)
"""Enough to see that everything runs; its figures mean little."""
