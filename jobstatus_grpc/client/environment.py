"""The JOBSTATUS_* variables: the server of a client that names none, and the job that the program runs as."""

from __future__ import annotations

import os
from typing import NamedTuple

from jobstatus_grpc.client.connection import Endpoint, endpoint

DEFAULT_ADDRESS = "127.0.0.1:50051"


class Found(NamedTuple):
    """The server of a client, and the job that its tracked jobs are part of."""

    endpoint: Endpoint
    job_id: str
    """The job on that server that `jobstatus run` made for this program; "": none."""


def find_server(
    address: str | None, *, token: str | None, ca_file: str | None, cert_file: str | None, key_file: str | None
) -> Found:
    """Return the server that a client's arguments name, without an address completed by the variables.

    With an address the variables do not count: the token must not be sent to another server than it is for.

    Raises:
        ValueError: the values are not valid together; the message says what to write.
        OSError: a file cannot be read.
    """
    own_address = _variable("ADDRESS")
    job_id = (_variable("JOB_ID") or "") if address in (None, own_address) else ""
    if address is None:
        address = own_address or DEFAULT_ADDRESS
        token = token or _variable("TOKEN")
        ca_file = ca_file or _variable("CA")
        if cert_file is None and key_file is None:
            cert_file, key_file = _variable("CERT"), _variable("KEY")
    return Found(endpoint(address, token=token, ca_file=ca_file, cert_file=cert_file, key_file=key_file), job_id)


def _variable(name: str) -> str | None:
    return os.environ.get(f"JOBSTATUS_{name}") or None
