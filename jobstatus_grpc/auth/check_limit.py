"""The limit of checks that wait for the answer of an issuer or of an authenticator of another distribution."""

from __future__ import annotations

from jobstatus_grpc.errors import IdentityUnavailableError

MAX_CHECKS = 1_000
"""Calls that wait for one issuer or one authenticator; they are not among --max-requests yet."""


class CheckLimit:
    """Raises IdentityUnavailableError for a block beyond MAX_CHECKS. Each issuer and authenticator has its own, so that
    one that hangs refuses no callers of others."""

    def __init__(self) -> None:
        self._checks = 0

    def __enter__(self) -> None:
        if self._checks >= MAX_CHECKS:
            raise IdentityUnavailableError("too many callers are being identified; try again later")
        self._checks += 1

    def __exit__(self, *exception: object) -> None:
        self._checks -= 1
