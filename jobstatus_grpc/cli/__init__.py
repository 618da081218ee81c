"""The command line, `jobstatus`. Each command is imported when it is used; `main` prints any error as one line.

Modules here import gRPC, the client and the server inside functions, so that help and usage errors are fast.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import sys
from typing import Any

import click

from jobstatus_grpc.cli import exits
from jobstatus_grpc.errors import CannotStartError, JobStatusError

__all__ = ["main"]

COMMANDS = {
    "serve": "commands.serve:serve",
    "create": "commands.jobs:create",
    "get": "commands.jobs:get",
    "list": "commands.list:list_jobs",
    "tree": "commands.tree:tree",
    "update": "commands.update:update",
    "cancel": "commands.jobs:cancel",
    "delete": "commands.jobs:delete",
    "watch": "commands.watch:watch",
    "wait": "commands.watch:wait",
    "history": "commands.history:history",
    "run": "run.command:run",
    "relay": "commands.relay:relay",
    "whoami": "commands.whoami:whoami",
    "health": "commands.health:health",
    "profile": "commands.profile:profile",
    "token": "commands.token:token",
    "tls": "commands.tls:tls",
    "verify": "commands.verify:verify",
    "migrate": "commands.migrate:migrate",
    "backup": "commands.backup:backup",
    "restore": "commands.backup:restore",
    "completion": "commands.completion:completion",
}
"""Module and function of each command, in the order of the help."""


class LazyGroup(click.Group):
    """A group that imports a command when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return all names, in the order of COMMANDS."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command of this name; None if there is none."""
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(f"jobstatus_grpc.cli.{module}"), name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; print no error when it is interrupted or its output is closed."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise click.exceptions.Exit(exits.CLOSED_PIPE) from None
        except KeyboardInterrupt:
            if sys.stderr.isatty():
                click.echo(err=True)  # after the ^C
            raise click.exceptions.Exit(exits.INTERRUPTED) from None


@click.group(cls=LazyGroup, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, help="Print the version and exit.")
@click.pass_context
def jobstatus(ctx: click.Context, version: bool) -> None:
    """Report the status of jobs, and follow them to the end.

    Each flag --SOME-FLAG can also be set as the variable JOBSTATUS_SOME_FLAG (repeated flags: one value per line); the
    flag wins. Durations are written 250ms, 90s, 10m, 1h, 7d.

    \b
    Exit codes:
      0    succeeded
      1    the job failed, or the call was refused
      2    wrong usage or configuration
      3    the job was aborted or cancelled
      4    the server, or the store's database, cannot be reached
      5    no such job
      124  wait: timed out
           run: the exit code of its command
      130  interrupted
    """
    if version:
        from importlib.metadata import version as installed_version

        click.echo(f"jobstatus {installed_version('jobstatus-grpc')}")
    elif ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(exits.USAGE)


def main() -> None:
    """Run the command line of this process, and exit."""
    _make_streams_safe()
    _silence_grpc()
    code = _run(sys.argv[1:])
    exits.drop_unwritten(sys.stdout, sys.stderr)
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    """Run the command and print its error, if any, as one line on stderr; return the exit code."""
    if "_JOBSTATUS_COMPLETE" in os.environ:
        from jobstatus_grpc.cli.commands import completion

        completion.prepare()
    try:
        code: Any = jobstatus.main(arguments, prog_name="jobstatus", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else exits.SUCCEEDED
    except BrokenPipeError:
        return exits.CLOSED_PIPE
    except (KeyboardInterrupt, click.Abort):
        return exits.INTERRUPTED
    except click.ClickException as error:
        exits.say_error(_usage_message(error))
        return exits.USAGE
    except CannotStartError as error:
        exits.say_error(str(error))
        return exits.of_refused_start(error)
    except JobStatusError as error:
        exits.say_error(error.message)
        return exits.of_error(error)
    except OSError as error:
        exits.say_error(f"cannot write: {error.strerror}" if error.errno == errno.ENOSPC else str(error))
        return exits.FAILED


def _usage_message(error: click.ClickException) -> str:
    """Return the error and the command that prints the usage."""
    ctx = getattr(error, "ctx", None)
    message = error.format_message().rstrip(".")
    return f"{message}. See {ctx.command_path} --help" if ctx is not None else message


def _make_streams_safe() -> None:
    """Reopen closed standard streams, so that no socket gets fd 0 to 2; escape characters that cannot be encoded."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _silence_grpc() -> None:
    """Keep the log lines of gRPC's C core off stderr, unless the user has set their level.

    gRPC reads the variable when it is loaded, which is later. It is not in os.environ, which the commands of `run` and
    `relay` get.
    """
    if "GRPC_VERBOSITY" not in os.environ:
        os.putenv("GRPC_VERBOSITY", "NONE")
