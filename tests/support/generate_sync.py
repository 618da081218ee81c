"""Generates the sync client from the asyncio one, as httpcore does: `make sync`. A test compares the two files."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

CLIENT = Path(__file__).parents[2] / "jobstatus_grpc" / "client"

SOURCE = CLIENT / "aio.py"

TARGET = CLIENT / "sync.py"

# Each is found in the source, or generating fails.
TEXTS = {
    '"""The asyncio client. sync.py is generated from this file: run `make sync` after a change."""': (
        '"""The client without asyncio, generated from aio.py by `make sync`: edit that file."""'
    ),
    " for asyncio; an async context manager.": "; a context manager.",
    "It connects with its first call. Tasks may share it, and so may event loops: each has its own connection.": (
        "It connects with its first call. Threads may share it."
    ),
}

WORDS = [
    (r"\basync (def|for|with)\b", r"\1"),
    (r"\bawait ", ""),
    (r"\b__a(enter|exit)__\b", r"__\1__"),
    (r"\bAsync(?=[A-Z])", ""),
]


def generate(source: str) -> str:
    """Return the sync client for the asyncio client `source`, formatted."""
    for asynchronous, synchronous in TEXTS.items():
        if asynchronous not in source:
            raise ValueError(f"{SOURCE.name} no longer has {asynchronous!r}; correct TEXTS in {__file__}")
        source = source.replace(asynchronous, synchronous)
    for pattern, replacement in WORDS:
        source = re.sub(pattern, replacement, source)
    # Shorter names change the order of imports and the breaks of lines; a loop that only yields becomes `yield from`.
    for command in (["check", "--quiet", "--fix-only", "--unsafe-fixes", "--select=I,UP028"], ["format"]):
        ruff = [sys.executable, "-m", "ruff", *command, f"--stdin-filename={TARGET}", "-"]
        source = subprocess.run(ruff, input=source, capture_output=True, text=True, check=True).stdout
    return source


if __name__ == "__main__":
    TARGET.write_text(generate(SOURCE.read_text()))
