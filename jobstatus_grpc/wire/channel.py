"""Options of gRPC channels that clients and the server's own health checks share."""

from __future__ import annotations

from typing import TypeAlias

ChannelOption: TypeAlias = tuple[str, str | int]

OWN_CONNECTION: ChannelOption = ("grpc.use_local_subchannel_pool", 1)
"""By default all channels of a process to one address share a connection: a thousand watches of one client would delay
the calls of another, and closing one would not close its connection."""

WITHOUT_PROXY: tuple[ChannelOption, ...] = (
    # http_proxy, https_proxy and grpc_proxy, which gRPC heeds also for loopback and without TLS.
    ("grpc.enable_http_proxy", 0),
    # GRPC_ADDRESS_HTTP_PROXY, which the option above does not turn off: no address is to be reached by it.
    ("grpc.address_http_proxy_enabled_addresses", ""),
)
