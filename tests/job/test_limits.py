"""The checks of values, compared with the table of limits."""

from __future__ import annotations

import math
import re
import unicodedata
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobstatus_grpc.job import limits, validation

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)


def violations_of(check, *args, **kwargs):
    violations: validation.Violations = []
    check(*args, violations, **kwargs)
    return [violation.description for violation in violations]


@given(texts, st.integers(0, 100), st.booleans())
def test_a_text_is_measured_in_bytes_and_has_no_control_characters(value, max_bytes, multiline):
    is_long = len(value.encode()) > max_bytes
    allowed = "\n\t" if multiline else ""
    has_controls = any(unicodedata.category(character) == "Cc" and character not in allowed for character in value)
    found = violations_of(validation.check_text, value, max_bytes, "f", multiline=multiline)
    assert len(found) == is_long + has_controls


@pytest.mark.parametrize("code", [*range(0x20), *range(0x7F, 0xA0)])
def test_every_control_character_is_found(code):
    text = f"a{chr(code)}b"
    assert violations_of(validation.check_text, text, 100, "f")
    assert bool(violations_of(validation.check_text, text, 100, "f", multiline=True)) == (chr(code) not in "\n\t")


@given(texts | st.from_regex(r"[A-Za-z0-9._:-]{1,130}", fullmatch=True))
def test_an_id_is_1_to_128_plain_characters(value):
    is_id = 1 <= len(value) <= 128 and re.sub(r"[A-Za-z0-9._:-]", "", value) == ""
    assert len(violations_of(validation.check_id, value, "f")) == (not is_id)


@given(st.floats())
def test_progress_is_a_percentage(value):
    assert len(violations_of(validation.check_progress, value, "f")) == (
        not (math.isfinite(value) and 0 <= value <= 100)
    )


@pytest.mark.parametrize(
    ("value", "count"),
    [
        ({f"{number}": "" for number in range(64)}, 0),
        ({f"{number}": "" for number in range(65)}, 1),
        ({"k" * 63: "v" * 256}, 0),
        ({"k" * 64: "v"}, 1),
        ({"k": "v" * 257}, 1),
        ({"": ""}, 1),
        ({"a\n": "b\n", "c\t": "d\t"}, 4),
    ],
)
def test_labels_are_reported_one_by_one(value, count):
    assert len(violations_of(validation.check_labels, value, "job.labels")) == count


def test_too_many_labels_are_not_reported_one_by_one():
    background_tasks = {f"{number}\n": "\n" for number in range(100_000)}
    assert len(violations_of(validation.check_labels, background_tasks, "job.labels")) <= 2 * limits.MAX_LABELS + 1


@pytest.mark.parametrize(
    ("seconds", "is_fine"), [(1, True), (10, True), (0.999999, False), (10.000001, False), (-5, False), (0, False)]
)
def test_a_duration_has_both_its_ends(seconds, is_fine):
    bounds = timedelta(seconds=1), timedelta(seconds=10)
    assert (violations_of(validation.check_duration, timedelta(seconds=seconds), *bounds, "f") == []) == is_fine


numbers = st.floats() | st.integers()
plain = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


def is_finite(value):
    if isinstance(value, float):
        return math.isfinite(value)
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return all(is_finite(child) for child in children)


@given(st.dictionaries(st.text(max_size=3), plain, max_size=3))
def test_a_result_holds_finite_numbers_only(value):
    assert (violations_of(validation.check_result, value, "f") == []) == is_finite(value)


WRAPS = {
    "objects": lambda inner: {"a": inner},
    "lists": lambda inner: [inner],
    "both": lambda inner: [1, {"a": [inner]}],
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
@pytest.mark.parametrize("over", [0, 1])
def test_a_result_is_at_most_32_deep(wrap, over):
    def depth(item):
        children = item.values() if isinstance(item, dict) else item if isinstance(item, list) else None
        return 0 if children is None else 1 + max((depth(child) for child in children), default=0)

    value: dict[str, Any] = {"a": None}
    while depth({"a": wrap(value)}) <= limits.MAX_RESULT_DEPTH:
        value = {"a": wrap(value)}
    while depth(value) < limits.MAX_RESULT_DEPTH + over:
        value = {"a": value}
    assert len(violations_of(validation.check_result, value, "f")) == over
