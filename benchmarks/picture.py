"""docs/benchmarks.svg: the figures of benchmarks.overview as bars, readable on a light and on a dark page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape

from benchmarks.overview import QUESTIONS, SYSTEMS, Question, answers
from benchmarks.report import Figure, number
from benchmarks.servers import OURS

WIDTH, MARGIN, GAP = 880, 16, 32
PANEL_WIDTH = (WIDTH - 2 * MARGIN - GAP) // 2
TITLE_HEIGHT, BAR_HEIGHT, BAR_GAP = 48, 16, 8
LABEL_WIDTH, VALUE_WIDTH = 148, 62
STYLE = """\
text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328; }
.title { font-weight: 600; font-size: 14px; }
.note { fill: #59636e; font-size: 12px; }
.ours { fill: #0969da; }
.other { fill: #8c959f; }
.axis { stroke: #d1d9e0; }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc; }
  .note { fill: #9198a1; }
  .ours { fill: #4493f8; }
  .other { fill: #656c76; }
  .axis { stroke: #3d444d; }
}"""


def svg(figures: Sequence[Figure]) -> str:
    """Return the picture; empty if nothing of it was measured."""
    found = answers(figures)
    if not found:
        return ""
    panel_height = TITLE_HEIGHT + len(found) * (BAR_HEIGHT + BAR_GAP)
    height = 2 * MARGIN + 2 * panel_height + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{escape(_summary(found))}">',
        f"<style>\n{STYLE}\n</style>",
    ]
    for place, question in enumerate(QUESTIONS):
        x, y = MARGIN + place % 2 * (PANEL_WIDTH + GAP), MARGIN + place // 2 * (panel_height + GAP)
        values = {side: of_side[place] for side, of_side in found.items()}
        parts += [f'<g transform="translate({x} {y})">', *_panel(question, values), "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(question: Question, values: Mapping[str, float | None]) -> Iterator[str]:
    """Draw one figure: a bar for each system."""
    largest = max((value for value in values.values() if value), default=1.0)
    room = PANEL_WIDTH - LABEL_WIDTH - VALUE_WIDTH
    yield f'<text class="title" y="14">{escape(question.title)}</text>'
    yield f'<text class="note" y="32">{"longer" if question.is_rate else "shorter"} is better</text>'
    bottom = TITLE_HEIGHT + len(values) * (BAR_HEIGHT + BAR_GAP) - BAR_GAP
    for place, (side, value) in enumerate(values.items()):
        y = TITLE_HEIGHT + place * (BAR_HEIGHT + BAR_GAP)
        length = max(1.0, (value or 0) / largest * room)
        kind = "ours" if side in OURS else "other"
        yield f'<text x="{LABEL_WIDTH - 8}" y="{y + 12}" text-anchor="end">{escape(SYSTEMS[side])}</text>'
        if value is None:
            yield f'<text class="note" x="{LABEL_WIDTH + 6}" y="{y + 12}">no watch</text>'
            continue
        yield f'<rect class="{kind}" x="{LABEL_WIDTH}" y="{y}" width="{length:.1f}" height="{BAR_HEIGHT}" rx="2"/>'
        yield f'<text x="{LABEL_WIDTH + length + 6:.1f}" y="{y + 12}">{number(value)}</text>'
    yield f'<line class="axis" x1="{LABEL_WIDTH}" x2="{LABEL_WIDTH}" y1="{TITLE_HEIGHT - 4}" y2="{bottom + 4}"/>'


def _summary(found: Mapping[str, Sequence[float | None]]) -> str:
    """Return the picture in words, for screen readers."""
    sentences: list[str] = []
    for place, question in enumerate(QUESTIONS):
        values = (f"{SYSTEMS[side]} {number(of_side[place]) or 'none'}" for side, of_side in found.items())
        sentences.append(f"{question.title}: {', '.join(values)}.")
    return " ".join(sentences)
