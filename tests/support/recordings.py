"""Records commands in a terminal, for docs/: `make recordings`. Look at the pictures before you commit them.

Each recording is a cast, which `asciinema play` plays (https://docs.asciinema.org/manual/asciicast/v2/), and an SVG
that moves by itself.
"""

from __future__ import annotations

import codecs
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, TypeAlias

import pyte

from jobstatus_grpc import JobState, JobStatusClient
from tests.support.pseudo_terminal import PseudoTerminal
from tests.support.servers import ServerProcess

FOLDER = Path(__file__).parents[2] / "docs" / "recordings"
COLUMNS = 80
_PROMPT = "\x1b[1;32m$\x1b[0m "
_TYPED_SECONDS = 0.8
_LONGEST_PAUSE_SECONDS = 1.5
_LAST_FRAME_SECONDS = 4.0
_SHORTEST_FRAME_SECONDS = 0.09

Event: TypeAlias = tuple[float, str]
"""Seconds since the start, and what the terminal receives."""


class Cast(NamedTuple):
    """A recording of a terminal."""

    title: str
    rows: int
    events: Sequence[Event]

    def write(self) -> str:
        """Return it in asciinema's format, version 2: a header and an event per line."""
        header = {"version": 2, "width": COLUMNS, "height": self.rows, "title": self.title}
        lines = [header, *([round(at, 2), "o", text] for at, text in self.events)]
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    @classmethod
    def read(cls, text: str) -> Cast:
        """Return the recording in a file that `write` made."""
        header, *events = map(json.loads, text.splitlines())
        return cls(header["title"], header["height"], [(at, data) for at, _, data in events])


# ---- what is recorded


class _Recorder:
    def __init__(self, title: str, rows: int, address: str) -> None:
        self._title, self._rows = title, rows
        programs = str(Path(sys.executable).parent)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("JOBSTATUS_")}
        self._environment = {
            **kept,
            "JOBSTATUS_ADDRESS": address,
            "TERM": "xterm-256color",
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        }
        self._events: list[Event] = []
        self._now = 0.0

    def run(self, command: str, meanwhile: Callable[[], None] = lambda: None, *, folder: str = ".") -> None:
        """Record a command up to its end, in a folder; `meanwhile` is called at once, in a thread."""
        self._add(0, _PROMPT)
        # The first command is there from the start, so that the picture never begins with an empty terminal.
        self._add(_TYPED_SECONDS if len(self._events) > 1 else 0, f"{command}\r\n")
        worker = threading.Thread(target=meanwhile)
        shell = ["bash", "-c", f"cd {folder} && {command}"]
        with PseudoTerminal(shell, environment=self._environment, columns=COLUMNS) as terminal:
            terminal.resize(self._rows, COLUMNS)
            worker.start()
            terminal.read_to_end()
        worker.join()
        decode = codecs.getincrementaldecoder("utf-8")().decode
        before = terminal.received[0][0]
        for at, data in terminal.received:
            self._add(min(at - before, _LONGEST_PAUSE_SECONDS), decode(data))
            before = at

    def _add(self, after_seconds: float, text: str) -> None:
        self._now += after_seconds
        if text:
            self._events.append((self._now, text))

    def finish(self) -> Cast:
        self._add(0.5, _PROMPT)
        return Cast(self._title, self._rows, self._events)


_ENCODER = """#!/bin/sh
for percent in 8 21 37 52 68 81 94 100; do
    echo "frame $((percent * 30)) of 3000, $percent%"
    sleep 0.5
done
"""


def _record_run(address: str) -> Cast:
    recorder = _Recorder("jobstatus run", 15, address)
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "encode"
        program.write_text(_ENCODER)
        program.chmod(0o755)
        recorder.run("jobstatus run --id lecture -- ./encode lecture.mov", folder=folder)
    recorder.run("jobstatus history lecture")
    return recorder.finish()


def _record_watch(address: str) -> Cast:
    recorder = _Recorder("jobstatus watch", 4, address)
    with JobStatusClient(address) as client:
        job = client.create("customers", id="import", state=JobState.IN_PROGRESS, progress=0)

        def work() -> None:
            for page in range(1, 13):
                time.sleep(0.4)
                client.update(job.id, progress=page * 8, reason=f"page {page} of 12")
            client.update(job.id, state=JobState.SUCCEEDED, result={"rows": 11873})

        recorder.run("jobstatus watch import", work)
    return recorder.finish()


def _record_tree(address: str) -> Cast:
    recorder = _Recorder("jobstatus watch --tree", 7, address)
    with JobStatusClient(address) as client:
        client.create("nightly", id="nightly", state=JobState.IN_PROGRESS)
        names = ["backup", "report", "thumbnails"]
        for name in names:
            client.create(name, id=f"nightly.{name}", parent_id="nightly")

        def work() -> None:
            for step in range(1, 19):
                time.sleep(0.35)
                for delay, name in enumerate(names):
                    done = (step - 3 * delay) * 10
                    if 0 < done < 100:
                        client.update(f"nightly.{name}", state=JobState.IN_PROGRESS, progress=done)
                    elif done == 100:
                        client.update(f"nightly.{name}", state=JobState.SUCCEEDED)
            client.update("nightly", state=JobState.SUCCEEDED)

        recorder.run("jobstatus watch --tree nightly", work)
    return recorder.finish()


# ---- how it is drawn

_CELL_WIDTH, _ROW_HEIGHT, _MARGIN, _BAR = 8.4, 19, 14, 30
_BACKGROUND, _TEXT = "#16191d", "#d6dae0"
_COLOURS = {
    "default": _TEXT, "black": "#5c6370", "red": "#f47067", "green": "#57ab5a", "brown": "#daaa3f", "blue": "#6cb6ff",
    "magenta": "#dcbdfb", "cyan": "#56d4dd", "white": "#d6dae0", "brightblack": "#7d8590", "brightred": "#ff938a",
    "brightgreen": "#6bc46d", "brightbrown": "#eac55f", "brightblue": "#96d0ff", "brightmagenta": "#f0d4ff",
    "brightcyan": "#8ae8ef", "brightwhite": "#ffffff",
}  # fmt: skip

Row: TypeAlias = str
"""A row of a screen as SVG, without its place."""


def draw(cast: Cast) -> str:
    """Return the recording as an SVG that repeats for ever; where reduced motion is preferred, only its last frame."""
    frames = list(_frames(cast))
    rows = {row: f"r{number}" for number, row in enumerate(dict.fromkeys(row for _, frame in frames for row in frame))}
    width = round(COLUMNS * _CELL_WIDTH + 2 * _MARGIN)
    height = cast.rows * _ROW_HEIGHT + _BAR + _MARGIN
    duration = frames[-1][0] + _LAST_FRAME_SECONDS
    steps = [
        f"{at / duration:.2%}{{transform:translateX({-number * width}px)}}" for number, (at, _) in enumerate(frames)
    ]
    last = f"translateX({-(len(frames) - 1) * width}px)"
    drawn = (
        f'<use href="#{rows[row]}" x="{number * width + _MARGIN}" y="{_BAR + (line + 1) * _ROW_HEIGHT - 5}"/>'
        for number, (_, frame) in enumerate(frames)
        for line, row in enumerate(frame)
        if row
    )
    circles = (
        f'<circle cx="{_MARGIN + 6 + 18 * number}" cy="15" r="5" fill="{colour}"/>'
        for number, colour in enumerate(("#f47067", "#daaa3f", "#57ab5a"))
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
            f' role="img"><title>{escape(cast.title)}</title>',
            "<style>text{font:14px ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;"
            "white-space:pre}.b{font-weight:bold}"
            f"#film{{fill:{_TEXT};animation:film {duration:.2f}s steps(1,end) infinite}}"
            f"@keyframes film{{{''.join(steps)}}}"
            f"@media(prefers-reduced-motion:reduce){{#film{{animation:none;transform:{last}}}}}</style>",
            "<defs>",
            *(f'<g id="{name}">{row}</g>' for row, name in rows.items() if row),
            "</defs>",
            f'<rect width="{width}" height="{height}" rx="8" fill="{_BACKGROUND}"/>',
            *circles,
            '<g id="film">',
            *drawn,
            "</g></svg>",
            "",
        ]
    )


def _frames(cast: Cast) -> Iterator[tuple[float, list[Row]]]:
    """Return the screens that differ, and the time from which each is shown."""
    screen = pyte.Screen(COLUMNS, cast.rows)
    stream = pyte.Stream(screen)
    shown: list[Row] = []
    for number, (at, text) in enumerate(cast.events):
        stream.feed(text)
        is_last = number + 1 == len(cast.events)
        if not is_last and cast.events[number + 1][0] - at < _SHORTEST_FRAME_SECONDS:
            continue  # the next output belongs to this frame
        frame = [_row(screen, line) for line in range(cast.rows)]
        if frame != shown:
            yield (at if shown else 0.0), frame
        shown = frame


def _row(screen: pyte.Screen, line: int) -> Row:
    cells = [screen.buffer[line][column] for column in range(COLUMNS)]
    spans, column = [], 0
    for (colour, is_bold), group in groupby(cells, key=lambda cell: (cell.fg, cell.bold)):
        text = "".join(cell.data for cell in group)
        if stripped := text.strip():
            start = (column + len(text) - len(text.lstrip())) * _CELL_WIDTH
            # Any font keeps to the columns by this.
            length = f'textLength="{len(stripped) * _CELL_WIDTH:.1f}" lengthAdjust="spacingAndGlyphs"'
            look = "" if colour == "default" else f' fill="{_COLOURS.get(colour, f"#{colour}")}"'
            weight = ' class="b"' if is_bold else ""
            spans.append(f'<text x="{start:.1f}" {length}{look}{weight}>{escape(stripped, quote=False)}</text>')
        column += len(text)
    return "".join(spans)


def main() -> None:
    """Record each command against a server, or with --draw only draw the casts in docs/ again."""
    if "--draw" not in sys.argv[1:]:
        FOLDER.mkdir(exist_ok=True)
        for name, record in (("run", _record_run), ("watch", _record_watch), ("tree", _record_tree)):
            with ServerProcess() as server:
                (FOLDER / f"{name}.cast").write_text(record(server.address).write(), encoding="utf-8")
    for path in FOLDER.glob("*.cast"):
        path.with_suffix(".svg").write_text(draw(Cast.read(path.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
