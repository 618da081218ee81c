"""What a team would otherwise use: a module for each, with its server, its requests, and its protocol.

A module has `run(bench, folder)`, a context manager that yields the Server, and `requirement()`, which says what to
install if something is missing. Each server has the settings with which an acknowledged update is durable.
"""

from __future__ import annotations

from typing import NamedTuple


class Guarantees(NamedTuple):
    """What a system promises about the status of a job, in a few words for each column of the table."""

    durable: str
    watch: str
    fencing: str
    final: str


OUR_GUARANTEES = Guarantees("yes", "yes", "yes", "yes")
ETCD_GUARANTEES = Guarantees("yes", "yes", "you write it: Txn", "you write it: Txn")
