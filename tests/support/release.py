"""Completes a release in dist/: `make release`, which has built sdist and wheel there. See docs/release.md.

Writes the bill of materials, and checks the metadata and whether the tree is ready to be published.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import tomli

from tests.support.stored_databases import NEWEST, STORES

ROOT = Path(__file__).parents[2]
DIST = ROOT / "dist"
BASELINE = ROOT / "tests/project/api_baseline.binpb"
_PROGRAMS = Path(sys.executable).parent


def version() -> str:
    """Return the version of the package."""
    return str(tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"])


def obstacles() -> Iterator[str]:
    """Return what is left to do before this tree is published, a line each."""
    if changes := _output("git", "status", "--porcelain"):
        yield f"commit or remove these changes:\n{changes}"
    if not re.search(
        rf"^## \[{re.escape(version())}\] - \d{{4}}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M
    ):
        yield f"CHANGELOG.md: head what is in the release with `## [{version()}] - YYYY-MM-DD`"
    with tempfile.TemporaryDirectory() as folder:
        now = Path(folder) / "api.binpb"
        _run(_PROGRAMS / "buf", "build", "--exclude-source-info", "--output", now)
        if now.read_bytes() != BASELINE.read_bytes():
            yield "the API is not that of the baseline: make baseline"
    for name, newest in NEWEST.items():
        if not (STORES / name / f"version_{newest}.sql").exists():
            yield f"version {newest} of the schema of {name} is not stored: make stored-databases"


def write_bill_of_materials(wheel: Path, path: Path) -> None:
    """Write what an installation of `wheel` with the extra `all` consists of, in the form of CycloneDX."""
    with tempfile.TemporaryDirectory() as folder:
        _run(sys.executable, "-m", "venv", "--without-pip", folder)
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        _run(*pip, "--python", folder, "install", f"{wheel}[all]")
        form = ["--output-reproducible", "--pyproject", ROOT / "pyproject.toml", "--output-file", path]
        _run(_PROGRAMS / "cyclonedx-py", "environment", *form, Path(folder) / "bin/python")


def main() -> None:
    """Exit with 1 if the release must not be published; with --draft, print why, and exit with 0."""
    os.environ["SOURCE_DATE_EPOCH"] = _output("git", "log", "-1", "--format=%ct")
    left = list(obstacles())
    for each in left:
        print(f"not ready: {each}", file=sys.stderr)
    if left and "--draft" not in sys.argv[1:]:
        sys.exit(1)
    (wheel,) = DIST.glob("*.whl")
    _run(_PROGRAMS / "twine", "check", "--strict", *DIST.glob("*.whl"), *DIST.glob("*.tar.gz"))
    write_bill_of_materials(wheel, wheel.with_name(f"jobstatus_grpc-{version()}.cdx.json"))


def _run(*command: object) -> None:
    subprocess.run([str(part) for part in command], cwd=ROOT, check=True)


def _output(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


if __name__ == "__main__":
    main()
