"""`jobstatus health`: the status from grpc.health.v1, as an exit code for scripts and container probes."""

from __future__ import annotations

from typing import Any

import click

from jobstatus_grpc import errors
from jobstatus_grpc.cli import exits, output
from jobstatus_grpc.cli.connection import connected
from jobstatus_grpc.cli.options import flag
from jobstatus_grpc.cli.target import Connection

SERVING = 0

NOT_SERVING = 1


@click.command()
@flag("--service NAME", "A service, such as jobstatus.v1.JobStatusService. Default: the whole server.", default="")
@flag("--json", "Print the status as JSON.", to="as_json")
@connected
@click.pass_context
def health(ctx: click.Context, /, *, connection: Connection, service: str, as_json: bool) -> None:
    """Print the server's health.

    Exits with 0 if it is serving, 1 if it is not, 4 if it cannot be reached.
    """
    try:
        word = _check(connection, service)
    except errors.NotFoundError:
        word = "service_unknown"
    except errors.JobStatusError as error:
        exits.say_error(error.message)
        ctx.exit(exits.UNREACHABLE if exits.of_error(error) == exits.UNREACHABLE else NOT_SERVING)
    click.echo(output.in_json({"status": word}) if as_json else word)
    ctx.exit(SERVING if word == "serving" else NOT_SERVING)


def _check(connection: Connection, service: str) -> str:
    """Return the status in lower case; raise a JobStatusError if the call fails."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from jobstatus_grpc.wire import status

    endpoint = connection.endpoint()
    with endpoint.open() as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            response = stub.Check(
                health_pb2.HealthCheckRequest(service=service),
                timeout=connection.timeout_seconds,
                metadata=endpoint.metadata,
            )
        except grpc.RpcError as error:
            raise status.from_rpc_error(error) from None
    word: str = health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)
    return word.lower()
