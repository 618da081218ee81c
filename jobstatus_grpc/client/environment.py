"""The JOBSTATUS_* variables: the server of a client that names none, and the job that the program runs as."""

from __future__ import annotations

import os
from typing import NamedTuple

from jobstatus_grpc.address import DEFAULT_PORT
from jobstatus_grpc.client import values
from jobstatus_grpc.client.endpoint import Endpoint, Tls, endpoint, tls_of
from jobstatus_grpc.client.token import Token, check_argument, token_of


class Found(NamedTuple):
    """The server of a client, and the job that its tracked jobs are part of."""

    endpoint: Endpoint
    job_id: str
    """The job on that server that `jobstatus run` made for this program; "": none."""


def find_server(
    address: str | None, *, token: Token | None, tenant: str | None, tls: Tls | bool | None, insecure: bool
) -> Found:
    """Return the server that a client's arguments name, without an address completed by the variables.

    With an address the variables do not count: the token must not be sent to another server than it is for.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the values are not valid together; the message says what to write.
        OSError: a file cannot be read.
    """
    values.check_text(address, "address")
    check_argument(token)
    if not isinstance(tls, Tls | bool | None):
        raise TypeError(f"tls must be True or a Tls, is {type(tls).__name__}")
    own_address = _variable("ADDRESS")
    job_id = (_variable("JOB_ID") or "") if address in (None, own_address) else ""
    if address is None:
        address = own_address or f"127.0.0.1:{DEFAULT_PORT}"
        token = token or token_of(*(_variable(name) for name in ("TOKEN", "TOKEN_FILE", "TOKEN_COMMAND")))
        tenant = tenant or _variable("TENANT")
        if tls is None:
            tls = tls_of(*(_variable(name) for name in ("CA", "CERT", "KEY", "SERVER_NAME")))
        insecure = insecure or (_variable("INSECURE") or "").lower() in _TRUE
    return Found(endpoint(address, token=token, tenant=tenant, tls=tls, insecure=insecure), job_id)


_TRUE = ("1", "true", "t", "yes", "y", "on")
"""What the command line takes as true."""


def _variable(name: str) -> str | None:
    return os.environ.get(f"JOBSTATUS_{name}") or None
