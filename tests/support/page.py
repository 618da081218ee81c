"""Runs the commands and the code of a page of documentation as its reader would, in one folder and one shell."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

MARK = "--- exit code:"

ADDRESS = re.compile(r"((?:127\.0\.0\.1|localhost|0\.0\.0\.0):|--port )(\d{4,5})\b")

FOLDERS = ("/backups", "/etc/jobstatus", "/run/jobstatus", "/var/lib/jobstatus")
"""Folders of the machine that pages name: folders within that of the page instead."""

TIMEOUT_SECONDS = 40
"""Of a command: below the timeout of a test, so that the failure shows what the command said."""

SERVES = re.compile(r"\b(jobstatus serve|make run)\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced block of a page."""

    line: int
    """Of the page, from 1."""
    section: str
    language: str
    title: str
    """The file that it is the contents of; "": none."""
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What a shell runs: a command of a console block with the output that is shown, or a whole block of code."""

    line: int
    section: str
    text: str
    output: Sequence[str] = ()
    language: str = "console"


def blocks_of(text: str) -> Iterator[Block]:
    """Yield the fenced blocks of a page."""
    for match in re.finditer(r"^( *)```(\w*)([^\n]*)\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE):
        indent, language, info, body = match.groups()
        title = re.search(r'title="(.*?)"', info)
        yield Block(
            line=text[: match.start()].count("\n") + 1,
            section=(["", *re.findall(r"^#+ (.*)$", text[: match.start()], re.MULTILINE)])[-1],
            language=language,
            title=title[1] if title else "",
            text=re.sub(f"^{indent}", "", body, flags=re.MULTILINE),
        )


def commands_of(text: str) -> Iterator[Command | Block]:
    """Yield what a page has to run, in its order, and the blocks that are contents of files."""
    blocks = list(blocks_of(text))
    for block, following in itertools.zip_longest(blocks, blocks[1:]):
        if block.title:
            yield block
        elif block.language == "console":
            yield from _lines_of(block)
        elif block.language in ("bash", "sh", "python"):
            # A block of text directly after it is its output.
            end = block.line + block.text.count("\n") + 3
            is_output = following is not None and (following.language, following.line) == ("text", end)
            output = following.text.splitlines() if following is not None and is_output else ()
            language = "python" if block.language == "python" else "bash"
            yield Command(line=block.line, section=block.section, text=block.text, output=output, language=language)


def _lines_of(block: Block) -> Iterator[Command]:
    for match in re.finditer(r"^\$ ((?:.*\\\n)*.*)\n((?:(?!\$ ).*\n)*)", block.text, re.MULTILINE):
        line = block.line + 1 + block.text[: match.start()].count("\n")
        yield Command(line=line, section=block.section, text=match[1], output=match[2].splitlines())


class PageRun:
    """A shell in a folder; a context manager that ends every process that was started in it.

    The addresses and folders of the page are replaced, so that pages can be run at once. A page that starts no server
    finds one. A command that starts a server is left to run, as in another terminal.
    """

    def __init__(self, text: str, folder: Path, *, checkout: Path) -> None:
        self._folder = folder
        self._ports: dict[str, int] = {}
        machine = folder / ".machine"
        for each in FOLDERS:
            Path(f"{machine}{each}").mkdir(parents=True)
        if re.search(r"^\$ make ", text, re.MULTILINE):
            for path in checkout.iterdir():
                (folder / path.name).symlink_to(path)
        self._machine = str(machine)
        self._is_served = any(isinstance(each, Command) and SERVES.search(each.text) for each in commands_of(text))
        own = f"127.0.0.1:{self._port('50051')}"
        self._environment = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": self._machine,
            "LANG": "C.UTF-8",
            "JOBSTATUS_ADDRESS": own,
            "JOBSTATUS_LISTEN": own,
            "JOBSTATUS_LOG_LEVEL": "warning",
        }
        if not self._is_served:
            self._environment["JOBSTATUS_STORE"] = f"sqlite:///{machine}/var/lib/jobstatus/jobs.db"
            for flag, port in (("HTTP", "8080"), ("METRICS", "9464")):
                if f":{port}" in text:
                    self._environment[f"JOBSTATUS_{flag}"] = f"127.0.0.1:{self._port(port)}"
        self._shell: subprocess.Popen[str] | None = None

    def __enter__(self) -> PageRun:
        self._shell = subprocess.Popen(
            ["bash"],
            cwd=self._folder,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        if not self._is_served:
            self.run(Command(line=0, section="", text="jobstatus serve & SERVER=$!"))
        return self

    def __exit__(self, *_: object) -> None:
        assert self._shell is not None
        self._kill()
        self._shell.communicate()

    def _kill(self) -> None:
        """End all processes of the shell's session, and the shell."""
        assert self._shell is not None
        ended = []
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                if os.getsid(process.pid) == self._shell.pid:
                    process.send_signal(signal.SIGKILL)
                    ended.append(process)
        psutil.wait_procs(ended, timeout=30)

    def write(self, block: Block) -> None:
        """Write the file that a block is the contents of."""
        (self._folder / block.title).write_text(self._prepared(block.text))

    def run(self, command: Command) -> None:
        """Run it until its end, and until its output has each line that is shown, in this order.

        `…` stands for anything. `^C` as the last line ends the command after the lines before.

        Raises:
            AssertionError: it fails, or a line that is shown is missing.
        """
        text = self._prepared(command.text.strip()).replace("systemctl stop jobstatus", "kill $SERVER; wait $SERVER")
        shown = [self._prepared(line) for line in command.output if line.strip() not in ("", "…", "^C")]
        is_interrupted = "^C" in command.output
        if SERVES.search(text):
            shown = shown or ["listening on …"]
            text = text if "&" in text else f"{text} &"
        is_left = is_interrupted or bool(SERVES.search(text)) or text.endswith("&")
        if "profile" in text:  # the variable wins over a profile
            text = f"(unset JOBSTATUS_ADDRESS\n{text}\n)"
        if command.language != "console":
            path = self._folder / ".machine" / f"line-{command.line}"
            path.write_text(text)
            text = f"bash -eu {path}" if command.language == "bash" else f'python -W error -c "$(cat {path})"'
        self._send(f"{{ exec {text}\n}} </dev/null &" if is_interrupted else f"{{ {text}\n}} </dev/null")
        said, missing, code = self._read(shown, waits=is_left)
        if is_interrupted:
            self._send("kill $!; wait $! || true")
            self._read([], waits=False)
        where = f"line {command.line}: {command.text}\nsaid:\n{said}"
        assert code == 0 or is_interrupted, f"exit code {code} of {where}"
        assert not missing, f"{missing[0]!r} is not in the output of {where}"

    def _send(self, text: str) -> None:
        assert self._shell is not None
        assert self._shell.stdin is not None
        self._shell.stdin.write(f"{text}\nprintf '\\n%s %d\\n' '{MARK}' $?\n")
        self._shell.stdin.flush()

    def _read(self, shown: Sequence[str], *, waits: bool) -> tuple[str, list[str], int]:
        """Return the output, the lines that it lacks, and the exit code; `waits`: also after the exit for all lines."""
        assert self._shell is not None
        assert self._shell.stdout is not None
        said, missing, code = "", list(shown), None
        timer = threading.Timer(TIMEOUT_SECONDS, self._kill)
        timer.start()
        while code is None or (missing and waits):
            line = self._shell.stdout.readline()
            assert line, f"no end, or no line {missing[:1]}, within {TIMEOUT_SECONDS} s of:\n{said}"
            if line.startswith(MARK):
                code = int(line.removeprefix(MARK))
            else:
                said += line
                if missing and _is_shown(missing[0], line):
                    del missing[0]
        timer.cancel()
        return said, missing, code

    def _port(self, named: str) -> int:
        """Return the free port that stands for one of the page."""
        if named not in self._ports:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self._ports[named] = free.getsockname()[1]
        return self._ports[named]

    def _prepared(self, text: str) -> str:
        text = text.replace("redis://localhost", "redis://localhost:6379")
        text = ADDRESS.sub(lambda found: f"{found[1]}{self._port(found[2])}", text)
        return re.sub("|".join(FOLDERS), lambda found: self._machine + found[0], text)


def _is_shown(pattern: str, line: str) -> bool:
    return re.fullmatch(re.escape(pattern.rstrip()).replace("…", ".*"), line.rstrip()) is not None
