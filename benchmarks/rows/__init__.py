"""What can be measured, in the order of BENCHMARKS.md."""

from __future__ import annotations

from benchmarks.report import Row
from benchmarks.rows import (
    calls,
    cost,
    growth,
    identities,
    peers,
    postgres,
    python_client,
    pythons,
    sharing,
    tls,
    watching,
    web,
)

MODULES = (peers, calls, pythons, postgres, watching, sharing, tls, identities, web, python_client, growth, cost)
ROWS = {row.name: row for module in MODULES for row in vars(module).values() if isinstance(row, Row)}
