"""How long and how often to measure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the command line says about it."""

    repetitions: int = 3
    """Ours and the bare server take turns in each."""
    seconds: float = 5.0
    """Of each load of unary calls; with few callers a quarter of it."""
    idle_seconds: float = 30.0
    """Of watching ten thousand watchers to whom nothing happens; a heartbeat comes every 30."""
