"""The .proto files: in their format, linted, compatible with the last release, and what was generated from them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BUF = Path(sys.executable).with_name("buf")
BASELINE = Path(__file__).with_name("api_baseline.binpb")


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of each generated file by its path."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix not in {".pyc", ".typed"})
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_protos_keep_every_rule_of_buf_lint(run, root):
    run(BUF, "lint", folder=root)


def test_the_protos_are_in_the_format_of_buf(run, root):
    run(BUF, "format", "--diff", "--exit-code", folder=root)


def test_the_api_is_compatible_with_the_last_release(run, root):
    run(BUF, "breaking", "--against", BASELINE, folder=root)


@pytest.mark.proto
@pytest.mark.timeout(300)
def test_generated_code_is_what_make_proto_makes(run, root, tmp_path):
    run("make", "--silent", "proto", f"GENERATED={tmp_path}", folder=root)
    committed, made = contents(root / "generated"), contents(tmp_path)
    assert committed.keys() == made.keys()
    assert [path for path in made if made[path] != committed[path]] == [], "run make proto"
