"""A file that outgrows its size is two nouns, a function two verbs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 40


def our_files(root: Path) -> Iterator[Path]:
    for folder in ("jobstatus_grpc", "benchmarks", "tests"):
        yield from sorted((root / folder).rglob("*.py"))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def lines_without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    if ast.get_docstring(node) is not None:
        lines -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
    return lines


def test_no_file_is_longer_than_300_lines(root):
    sizes = {str(path.relative_to(root)): len(path.read_text().splitlines()) for path in our_files(root)}
    assert {path: lines for path, lines in sizes.items() if lines > MAX_FILE_LINES} == {}


def test_no_function_is_longer_than_40_lines(root):
    sizes = {
        f"{path.relative_to(root)}:{node.lineno} {node.name}": lines_without_docstring(node)
        for path in our_files(root)
        for node in functions(path)
    }
    assert {name: lines for name, lines in sizes.items() if lines > MAX_FUNCTION_LINES} == {}
