"""From an address and credentials to a channel, with the options that both clients use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc

from jobstatus_grpc.errors import UnavailableError

USER_AGENT = "jobstatus-grpc"
DEFAULT_TIMEOUT_SECONDS = 10.0
_SCHEMES = ("dns:", "unix:", "unix-abstract:", "ipv4:", "ipv6:", "vsock:", "xds:")

CHANNEL_OPTIONS: list[tuple[str, str | int]] = [
    ("grpc.primary_user_agent", USER_AGENT),
    # Notice within half a minute that the server's machine is gone, also between calls, so that the next call does not
    # run into its deadline. The server allows a ping every 10 s.
    ("grpc.keepalive_time_ms", 15_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # By default the third ping without data in between is not sent, and a watch that is silent is not looked after.
    ("grpc.http2.max_pings_without_data", 0),
    # The largest reply: 500 results of a batch, each with all its labels and texts.
    ("grpc.max_receive_message_length", 32 * 1024 * 1024),
    # A server that restarts is found again at once; by default the pauses grow from 1 s to 2 minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Despite its name also how long one attempt to connect may take, by default 20 s: a host that drops packets.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    # A new address of a server that has moved is looked up when it is needed; by default at most every 30 s.
    ("grpc.dns_min_time_between_resolutions_ms", 2_000),
    # By default all channels of a process to one address share a connection: a thousand watches of one client would
    # hold up the calls of another, and closing one would not close its connection.
    ("grpc.use_local_subchannel_pool", 1),
]


class ClientClosedError(UnavailableError):
    """The client is closed."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the server is and who calls; opens channels."""

    target: str
    credentials: grpc.ChannelCredentials | None = None
    """None: without TLS."""
    metadata: tuple[tuple[str, str], ...] | None = None
    """What each call carries."""

    def open(self) -> grpc.Channel:
        """Return a new channel; it connects with the first call."""
        if self.credentials is None:
            return grpc.insecure_channel(self.target, CHANNEL_OPTIONS)
        return grpc.secure_channel(self.target, self.credentials, CHANNEL_OPTIONS)

    def open_aio(self) -> grpc.aio.Channel:
        """Return a new channel of the running event loop; it connects with the first call."""
        if self.credentials is None:
            return grpc.aio.insecure_channel(self.target, CHANNEL_OPTIONS)
        return grpc.aio.secure_channel(self.target, self.credentials, CHANNEL_OPTIONS)


def endpoint(
    address: str,
    *,
    token: str | None = None,
    ca_file: str | None = None,
    cert_file: str | None = None,
    key_file: str | None = None,
) -> Endpoint:
    """Return the endpoint that a client's arguments name.

    Raises:
        ValueError: they do not make sense; the message says what to write.
        OSError: a file cannot be read.
    """
    metadata = None
    if token is not None:
        if not token or not token.isascii() or not token.isprintable() or " " in token:
            raise ValueError("the token must be printable ASCII without spaces")
        metadata = (("authorization", f"Bearer {token}"),)
    return Endpoint(_target(address), _credentials(ca_file, cert_file, key_file), metadata)


def _target(address: str) -> str:
    if address.startswith(_SCHEMES):
        return address
    host, _, port = address.rpartition(":")
    if not host or "/" in address or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{address!r} is not an address; write HOST:PORT, dns:///HOST:PORT or unix:/path")
    return address


def _credentials(ca_file: str | None, cert_file: str | None, key_file: str | None) -> grpc.ChannelCredentials | None:
    """Return credentials for TLS where any file is named; without a CA, the public ones that grpc brings count."""
    if (cert_file is None) != (key_file is None):
        raise ValueError("cert_file and key_file go together")
    if ca_file is None and cert_file is None:
        return None
    return grpc.ssl_channel_credentials(_read(ca_file), _read(key_file), _read(cert_file))


def _read(file: str | None) -> bytes | None:
    return None if file is None else Path(file).read_bytes()
