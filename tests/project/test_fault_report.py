"""docs/reliability.md is made of the rows that fault tests have recorded, and of nothing else."""

from __future__ import annotations

from tests.support import fault_report

THIS = "tests/project/test_fault_report.py::test_a_run_replaces_the_rows_of_its_own_tests"


def row(test, **values):
    fault = {"fault": "a fault", "count": 1200, "checked": "writes", "result": "none lost"}
    return {"test": test, **fault, "at": "2026-11-29", "commit": "abc", **values}


def test_the_page_is_the_recorded_rows():
    assert fault_report.PAGE.read_text("utf-8") == fault_report.page_of(fault_report.read(fault_report.RESULTS))


def test_a_run_replaces_the_rows_of_its_own_tests():
    other = THIS + "[other]"
    assert fault_report.merge([row(THIS), row(other)], [row(THIS, count=2)]) == [row(THIS, count=2), row(other)]


def test_a_test_that_fails_or_is_gone_loses_its_row():
    failed = {"test": THIS, "failed": True}
    assert fault_report.merge([row(THIS), row("tests/faults/test_gone.py::test_it")], [row(THIS), failed]) == []


def test_a_row_says_what_was_done_by_which_test_when_and_to_which_commit():
    page = fault_report.page_of([row(THIS)])
    assert "| a fault | 1,200 | writes | none lost | [test_fault_report](../tests/project/" in page
    assert "test_fault_report.py) | 1 |\n" in page
    assert "\n1. 2026-11-29, abc\n" in page
    assert "seeded bug" not in page
