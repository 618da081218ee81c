"""The versions of Python that are installed beside the one that runs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
"""The versions that the package supports."""


def find_python(version: str) -> str | None:
    """Return the program of a version, in PATH or among pyenv's; None: it is not installed."""
    others = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/{version}.*/bin/python")
    for program in (shutil.which(f"python{version}"), *sorted(map(str, others))):
        # pyenv has a program for each version in PATH, most of which only print how to choose the version.
        if program and subprocess.run([program, "-c", "import venv"], capture_output=True, check=False).returncode == 0:
            return program
    return None
