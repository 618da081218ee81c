"""Files of settings: what is wrong, and on which line."""

from __future__ import annotations

import re
from datetime import timedelta

import pytest

from jobstatus_grpc.toml_file import FileError, read_toml

READERS = {
    "things": lambda section: [
        {key: value.plain() for key, value in stanza.items()}
        for stanza in section.stanzas(("name",), ("size", "kinds", "wait"))
    ],
    "one": lambda section: {key: value.text() for key, value in section.entries().items()},
    "wait": lambda value: value.duration(shortest=timedelta(seconds=1), longest=timedelta(days=1)),
    "when": lambda value: value.instant(),
    "kind": lambda value: value.choice({"small": 1, "large": 2}),
    "count": lambda value: value.number(smallest=1, largest=9),
    "words": lambda value: value.texts(),
    "is_on": lambda value: value.flag(),
}


@pytest.fixture
def read(tmp_path):
    def read(text):
        path = tmp_path / "settings.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_toml(str(path), READERS)

    return read


def test_each_section_is_read_by_its_reader(read):
    text = '[[things]]\nname = "a"\n[[things]]\nname = "b"\nsize = 2\n[one]\nx = "y"\n'
    assert read(text) == {"things": [{"name": "a"}, {"name": "b", "size": 2}], "one": {"x": "y"}}


def test_an_empty_file_has_no_sections(read):
    assert read("") == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[[things]]\nname = "a"\n\n[[things]]\nname = "b"\nsise = 1', "line 6: things.sise: there is no such"),
        ('[[things]]\nname = "a"\n[[things]]\nsize = 1', "line 3: things: name missing: add name = …"),
        ("# one\n[thigns]\n", "line 2: thigns: there is no such setting; did you mean things?"),
        ('x = """\n[[things]]\n"""\nkind = "smal"', "line 1: x: there is no such setting"),
        ('kind = "smal"', "line 1: kind: 'smal' is not known; did you mean small?"),
        ('kind = "other"', "line 1: kind: 'other' is not known; there are: small, large"),
        ('words = [\n  "a",\n  "",\n]', "line 1: words: must not be empty"),
        ("words = []", "must not be empty"),
        ("kind = 1", "must be a text in quotes"),
        ('one = { "a.b" = 1 }', "one.'a.b': must be a text"),
        ("things = 1", "must be stanzas that begin with [[things]]"),
        ("[things]\na = 1", "must be stanzas that begin with [[things]]"),
        ("one = 1", "must be a table"),
        ("when = 2027-01-31T00:00:00", "must be a time with an offset"),
        ('when = "2027-01-31T00:00:00Z"', "without quotes"),
        ('wait = "9"', "must be a duration such as"),
        ('wait = "2d"', "must be a duration from 0:00:01 to 1 day"),
        ("count = 10", "must be a whole number from 1 to 9"),
        ("count = true", "must be a whole number"),
        ("is_on = 1", "must be true or false"),
        ("one = \n", "is not TOML: Invalid value (at line 1, column 7)"),
        (b"\xff = 1", "is not UTF-8"),
        ("[" * 5000, "is not TOML"),
    ],
)  # fmt: skip
def test_an_error_names_the_file_the_line_and_the_key(read, text, says):
    with pytest.raises(FileError, match=re.escape(says)) as caught:
        read(text)
    assert "settings.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('one = { x = "y" }\n\n\nkind = [\n 1,\n 2\n]\n', 4),
        ('[[things]]\nname = """\n[one]\n"""\nkinds = """\n\n"""\nz = 1\n', 8),
        ("# " + "\n" * 3000 + "kind = 1\n", 3001),
        ("# \u2028\nkind = 1\r\n", 2),
    ],
)
def test_the_line_is_where_the_value_begins(read, text, line):
    with pytest.raises(FileError, match=f", line {line}: "):
        read(text)


@pytest.mark.parametrize("path", ["/nowhere/at/all", "/", "a\0b"])
def test_a_file_that_cannot_be_read_is_one_error(path):
    with pytest.raises(FileError, match="cannot be read"):
        read_toml(path, READERS)
