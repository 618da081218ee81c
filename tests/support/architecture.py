"""Draws docs/architecture.svg from the import contract in pyproject.toml: `make architecture`."""

from __future__ import annotations

import ast
import textwrap
from html import escape
from pathlib import Path
from typing import Any

import tomli

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "docs/architecture.svg"
PACKAGE = "jobstatus_grpc"

_WIDTH, _BOX_HEIGHT, _GAP, _MARGIN, _HEADER, _LINES = 1080, 74, 12, 20, 64, 2
_CHARACTER_WIDTH = 6.6
"""Of a letter in 12 px, on average and a little more: a line is cut before it leaves its box."""
_PLAIN, _WITH_GRPC, _LINE, _TEXT, _MUTED = "#ffffff", "#e3effd", "#8a94a3", "#1b2430", "#56616f"


def _contracts() -> list[dict[str, Any]]:
    settings = tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts: list[dict[str, Any]] = settings["tool"]["importlinter"]["contracts"]
    return contracts


def layers() -> list[list[str]]:
    """Return the modules of the package, the layer that imports all others first."""
    (contract,) = (each for each in _contracts() if each.get("containers") == [PACKAGE])
    return [[name.strip() for name in layer.split("|")] for layer in contract["layers"] if layer != "__main__"]


def modules_with_grpc() -> set[str]:
    """Return the modules that may import gRPC or protobuf."""
    (contract,) = (each for each in _contracts() if "grpc" in each.get("forbidden_modules", ()))
    importers = (rule.partition(" -> ")[0].split(".")[1] for rule in contract["ignore_imports"])
    return set(importers)


def purpose(module: str) -> str:
    """Return the first sentence of a module's docstring, without Markdown."""
    path = ROOT / PACKAGE / f"{module}.py"
    source = path if path.exists() else ROOT / PACKAGE / module / "__init__.py"
    text = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split()).partition(". ")[0].rstrip(".").replace("`", "")


def draw() -> str:
    """Return the picture: a row for each layer, which imports the rows below it."""
    rows = layers()
    height = _HEADER + len(rows) * (_BOX_HEIGHT + _GAP) + _MARGIN
    with_grpc = modules_with_grpc()
    boxes = []
    for number, row in enumerate(rows):
        width = (_WIDTH - 2 * _MARGIN - (len(row) - 1) * _GAP) / len(row)
        for place, module in enumerate(row):
            x, y = _MARGIN + place * (width + _GAP), _HEADER + number * (_BOX_HEIGHT + _GAP)
            boxes.append(_box(module, x, y, width, _WITH_GRPC if module in with_grpc else _PLAIN))
    key = "A module imports only modules in the rows below its own. Blue: may import gRPC or protobuf."
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">',
            f"<title>The layers of {PACKAGE}</title>",
            f"<style>text{{font:12px system-ui,'Segoe UI','DejaVu Sans',sans-serif;fill:{_MUTED}}}"
            f".name{{font:600 15px ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;fill:{_TEXT}}}</style>",
            f'<rect width="{_WIDTH}" height="{height}" rx="8" fill="#f4f6f9"/>',
            f'<text x="{_MARGIN}" y="28" class="name">{PACKAGE}</text>',
            f'<text x="{_MARGIN}" y="48">{key}</text>',
            *boxes,
            "</svg>",
            "",
        ]
    )


def _box(module: str, x: float, y: float, width: float, fill: str) -> str:
    lines = textwrap.wrap(
        purpose(module),
        int((width - 24) / _CHARACTER_WIDTH),
        max_lines=_LINES,
        placeholder=" …",
        break_long_words=False,
    )
    texts = "".join(
        f'<text x="{x + 12:.0f}" y="{y + 45 + 16 * number:.0f}">{escape(line, quote=False)}</text>'
        for number, line in enumerate(lines)
    )
    size = f'width="{width:.0f}" height="{_BOX_HEIGHT}"'
    return (
        f'<rect x="{x:.0f}" y="{y:.0f}" {size} rx="5" fill="{fill}" stroke="{_LINE}"/>'
        f'<text x="{x + 12:.0f}" y="{y + 24:.0f}" class="name">{module}</text>{texts}'
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
