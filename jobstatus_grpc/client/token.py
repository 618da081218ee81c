"""The token of a client: a text, a file that is read again when it changes, or a command that prints it."""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from jobstatus_grpc.client import values
from jobstatus_grpc.files import read_file, signature_of

log = logging.getLogger("jobstatus_grpc.client")

CHECK_SECONDS = 1.0
"""Interval, at least, at which a client that makes calls looks at its token file."""

COMMAND_SECONDS = 60.0
"""How long the token that a command printed is used: less than the lifetime of any token, and a cheap rate."""

COMMAND_TIMEOUT_SECONDS = 30.0
"""Of a run of the command. The call that needs it waits, and in asyncio the event loop."""

MAX_TOKEN_BYTES = 8192
"""Of a file or an output: the server takes 16 KiB of metadata. What is longer is the wrong file."""


@dataclass(frozen=True, slots=True)
class TokenCommand:
    """A command that prints the token on stdout. It is run without a shell, when a call needs it.

    Raises:
        TypeError: it is neither a text nor a sequence of texts.
        ValueError: it is empty, or its quotes are not closed.
    """

    command: str | Sequence[str] = field(repr=False)
    """The program and its arguments; a text is split as a shell does."""

    def __post_init__(self) -> None:
        given: object = self.command
        if not isinstance(given, str | Sequence) or not all(isinstance(word, str) for word in given):
            raise TypeError("the command of a token must be a string or a sequence of strings")
        if not self.words:
            raise ValueError("the command of a token must not be empty")

    @property
    def words(self) -> list[str]:
        """The program and its arguments."""
        if not isinstance(self.command, str):
            return list(self.command)
        try:
            return shlex.split(self.command)
        except ValueError as error:
            raise ValueError(f"the command of a token cannot be split into words: {error}") from None

    def run(self) -> str:
        """Return the token.

        Raises:
            ValueError: the command failed, or printed no token; the message names it without its arguments.
        """
        program = self.words[0]
        try:
            done = subprocess.run(
                self.words,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=COMMAND_TIMEOUT_SECONDS,
                env=os.environ,  # without what our command line sets for itself alone
                check=False,
            )
        except subprocess.TimeoutExpired:
            why = f"has not ended within {COMMAND_TIMEOUT_SECONDS:g} s"
        except (OSError, ValueError) as error:
            why = f"cannot be run: {getattr(error, 'strerror', None) or error}"
        else:
            if done.returncode == 0:
                return _checked(done.stdout, f"the output of the token command {program}")
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            why = f"ended with exit code {done.returncode}" + (f": {lines[-1][:200]}" if lines else "")
        raise ValueError(f"the token command {program} {why}") from None


Token: TypeAlias = "str | os.PathLike[str] | TokenCommand"
"""What the argument `token` of a client may be."""


def check_argument(token: object) -> None:
    """Raise TypeError or ValueError unless `token` is a Token or None."""
    if not isinstance(token, TokenCommand):
        values.check_text(token, "token", os.PathLike)


def token_of(token: str | None, token_file: str | None, token_command: str | Sequence[str] | None) -> Token | None:
    """Return what the flags and variables of the token stand for; None if there are none.

    Raises:
        ValueError: more than one of them is there.
    """
    if sum(map(bool, (token, token_file, token_command))) > 1:
        raise ValueError("give one of the token, the token file and the token command")
    if token_file:
        return Path(token_file)
    return TokenCommand(token_command) if token_command else token


class RenewedToken:
    """The newest good token of a file or a command. Any thread may use it. It can be pickled."""

    def __init__(self, source: Path | TokenCommand, clock: Callable[[], float] = time.monotonic) -> None:
        """Read the token.

        Raises:
            ValueError: there is none that can be sent.
            OSError: the file cannot be read.
        """
        self._source = source
        self._interval_seconds = CHECK_SECONDS if isinstance(source, Path) else COMMAND_SECONDS
        self._now = clock
        self._seen: object = None
        self._problem = ""
        self._token = self._read()
        self._check_at = clock() + self._interval_seconds

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RenewedToken) and (self._source, self._token) == (other._source, other._token)

    def __hash__(self) -> int:
        return hash(self._source)

    def current(self) -> str:
        """Return the token. If the newest one is bad, a warning is logged once, and the one before stays in use."""
        if self._now() >= self._check_at:
            self._check_at = self._now() + self._interval_seconds  # first: other threads continue with the one before
            try:
                self._token = self._read()
            except (ValueError, OSError) as error:
                if str(error) != self._problem:
                    log.warning("the token cannot be renewed, the one from before stays in use: %s", error)
                self._problem = str(error)
            else:
                self._problem = ""
        return self._token

    def expire(self) -> None:
        """Make the next call look for a new token, because the server has refused this one."""
        self._check_at = float("-inf")

    def _read(self) -> str:
        try:
            return self._read_source()
        except ValueError as error:
            # Without the frames below: their variables have what was read, and error trackers send variables.
            raise error.with_traceback(None) from None

    def _read_source(self) -> str:
        if isinstance(self._source, TokenCommand):
            return self._source.run()
        signature = signature_of(self._source)
        if signature is not None and signature == self._seen:
            return self._token
        token = _checked(read_file(self._source, max_bytes=MAX_TOKEN_BYTES), f"the token in {self._source}")
        self._seen = signature
        return token


def _checked(output: bytes, place: str) -> str:
    """Return a token without the white space around it; raise ValueError if gRPC cannot send it."""
    token = output.decode("ascii", errors="replace").strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token or len(output) > MAX_TOKEN_BYTES:
        raise ValueError(f"{place} must be 1 to {MAX_TOKEN_BYTES} printable ASCII characters without spaces")
    return token
