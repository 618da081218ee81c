"""benchmarks/results.json, what was measured, and the documents that are made of it and of nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import capacity, document, picture
from benchmarks.document import CAPACITY, NOT_MEASURED, PICTURE, RESULTS
from benchmarks.report import Figure
from benchmarks.rows import ROWS

DOCUMENT = "BENCHMARKS.md"


@dataclass(slots=True)
class Results:
    """What was measured on which machine, in the order of the rows."""

    about: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)

    @classmethod
    def read(cls, root: Path) -> Results | None:
        """Return the results that are kept in a checkout; None: there are none."""
        file = root / RESULTS
        if not file.exists():
            return None
        found = json.loads(file.read_text())
        return cls(found["about"], [Figure.from_json(each) for each in found["figures"]])

    def replace(self, rows: Sequence[str], figures: Sequence[Figure]) -> None:
        """Put figures in the place of those of these rows, measured in another run."""
        of_rows = {name: [figure for figure in self.figures if figure.row == name] for name in ROWS}
        of_rows |= {name: [figure for figure in figures if figure.row == name] for name in rows}
        self.figures = [figure for of_row in of_rows.values() for figure in of_row]
        failed = set(map(NOT_MEASURED.format, rows))
        self.about = [*(line for line in self.about if line not in failed), f"in a run of their own: {', '.join(rows)}"]

    def keep_apart(self, kept: Results) -> None:
        """Take over the figures of rows that are measured only if they are asked for, if they are of this machine."""
        apart = [name for name, row in ROWS.items() if row.is_apart]
        if self.about[:1] == kept.about[:1] and any(figure.row in apart for figure in kept.figures):
            self.replace(apart, kept.figures)

    def as_json(self) -> str:
        """Return the file, with a line for each figure."""
        figures = ",\n".join(json.dumps(figure.as_json(), ensure_ascii=False) for figure in self.figures)
        about = json.dumps(self.about, indent=0, ensure_ascii=False)
        return f'{{"about": {about},\n"figures": [\n{figures}\n]}}\n'

    def documents(self) -> dict[str, str]:
        """Return what is made of the results: the text of each file, by its path in the checkout."""
        made = {
            DOCUMENT: document.whole(self.about, self.figures),
            PICTURE: picture.svg(self.figures),
            CAPACITY: capacity.document(self.about, self.figures),
        }
        return {path: text for path, text in made.items() if text}

    def write(self, root: Path) -> None:
        """Write the file, and what is made of it as it is read again: its numbers are rounded."""
        _write(root / RESULTS, self.as_json())
        kept = Results.read(root)
        assert kept is not None
        for path, text in kept.documents().items():
            _write(root / path, text)


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
