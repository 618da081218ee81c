"""Reads a TOML file of settings: each key is checked, and each error names the file, the line and the key.

The sections of a file belong to the modules that use them. Each gives a function from a Value to what it needs.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeAlias, TypeVar

from jobstatus_grpc.errors import CannotStartError
from jobstatus_grpc.files import read_file, signature_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")

Keys: TypeAlias = "tuple[str | int, ...]"
"""The way to a value: names of tables, and places in arrays from 0."""

Signatures: TypeAlias = "dict[str, object]"
"""Of files, by their paths: see `signature_of`."""

_UNIT_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}


class FileError(CannotStartError):
    """A file of settings cannot be used; the message names file, line and key, and never a value that may be secret."""


class Document:
    """A file of settings: its values, and their lines."""

    def __init__(self, path: str, seen: Signatures | None = None) -> None:
        """Read and parse the file.

        Args:
            path: of the file.
            seen: gets the signature of this file, and of each that `Value.read_file` reads, from before it was read.

        Raises:
            FileError: it cannot be read, or is not TOML.
        """
        self.path = path
        self._seen = {} if seen is None else seen
        self._seen[path] = signature_of(path)
        text = _text_of(path)
        self._lines = text.split("\n")
        try:
            self._root = Value(self, (), tomllib.loads(text))
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise FileError(f"{path} is not TOML: {str(error) or 'it is nested too deeply'}") from None

    def read(self, sections: Mapping[str, Reader]) -> dict[str, Any]:
        """Return what each reader makes of its section, the top-level key of this name; absent ones are absent here.

        Raises:
            FileError: a section is unknown, or a reader refuses a value.
        """
        found = self._root.table(optional=sections)
        return {name: sections[name](value) for name, value in found.items()}

    def read_file(self, path: Path) -> bytes:
        """Return the bytes of another file.

        Raises:
            OSError, ValueError: it cannot be read, or is too large.
        """
        self._seen[str(path)] = signature_of(str(path))
        return read_file(path)

    def line_of(self, keys: Keys) -> int:
        """Return the line, from 1, on which the value begins that `keys` lead to; only the parser knows TOML."""
        low, high = 0, len(self._lines)
        while low < high:  # the smallest number of lines that has the value
            middle = (low + high) // 2
            if self._has(middle, keys):
                high = middle
            else:
                low = middle + 1
        begin = max(low - 1, 0)
        while begin > 0 and self._parsed(begin) is None:  # a value of several lines
            begin -= 1
        return begin + 1

    def _has(self, count: int, keys: Keys) -> bool:
        """Return whether the value is complete within the first `count` lines."""
        while (found := self._parsed(count)) is None and count > 0:
            count -= 1
        for key in keys:
            try:
                found = found[key]
            except (KeyError, IndexError, TypeError):
                return False
        return True

    def _parsed(self, count: int) -> Any:
        try:
            return tomllib.loads("\n".join(self._lines[:count]) + "\n")
        except tomllib.TOMLDecodeError:
            return None


class Value:
    """A value of the file. Its methods return it as what is expected, or raise a FileError that names its place."""

    __slots__ = ("_document", "_keys", "_value")

    def __init__(self, document: Document, keys: Keys, value: Any) -> None:
        self._document = document
        self._keys = keys
        self._value = value

    def refuse(self, why: str) -> NoReturn:
        """Raise a FileError; `why` says what the value must be, and what to do."""
        raise FileError(f"{self._document.path}, line {self._document.line_of(self._keys)}: {self.name}: {why}")

    @property
    def name(self) -> str:
        """The keys as one writes them, without places in arrays: `tokens.only.labels`."""
        return ".".join(_spell_key(key) for key in self._keys if isinstance(key, str)) or "the file"

    @property
    def line(self) -> int:
        """The line of the file, from 1."""
        return self._document.line_of(self._keys)

    def plain(self) -> Any:
        """Return the value as the parser gives it."""
        return self._value

    def text(self, *, max_bytes: int = 1024) -> str:
        """Return a text that is not empty, has no control characters, and at most `max_bytes` in UTF-8."""
        if not isinstance(self._value, str):
            self.refuse("must be a text in quotes")
        if not self._value or not self._value.isprintable():
            self.refuse("must not be empty, or hold control characters")
        if len(self._value.encode()) > max_bytes:
            self.refuse(f"must be at most {max_bytes} bytes")
        return self._value

    def path(self) -> Path:
        """Return the path that the text names; a relative one begins at the folder of the settings."""
        return Path(self._document.path).parent / self.text()

    def read_file(self) -> bytes:
        """Return the bytes of the file at `path`, which belongs to the settings from then on."""
        try:
            return self._document.read_file(self.path())
        except (OSError, ValueError) as error:
            self.refuse(f"cannot be read: {getattr(error, 'strerror', None) or error}")

    def texts(self) -> tuple[str, ...]:
        """Return the texts of an array of at least one; a single text is an array of one."""
        if not isinstance(self._value, list):
            return (self.text(),)
        if not self._value:
            self.refuse("must not be empty")
        return tuple(each.text() for each in self.items())

    def choice(self, choices: Mapping[str, T]) -> T:
        """Return what the text stands for in `choices`."""
        text = self.text()
        if text not in choices:
            self.refuse(f"{text!r} is not known; {_advice(text, choices)}")
        return choices[text]

    def number(self, *, smallest: int, largest: int) -> int:
        """Return a whole number within these bounds, both included."""
        if not isinstance(self._value, int) or isinstance(self._value, bool) or not smallest <= self._value <= largest:
            self.refuse(f"must be a whole number from {smallest} to {largest}")
        return self._value

    def flag(self) -> bool:
        """Return true or false."""
        if not isinstance(self._value, bool):
            self.refuse("must be true or false")
        return self._value

    def duration(self, *, shortest: timedelta, longest: timedelta) -> timedelta:
        """Return a duration, such as "90s", "10m" or "7d", within these bounds, both included."""
        match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)(ms|s|m|h|d)", self._value) if _is_text(self._value) else None
        if match is None:
            self.refuse('must be a duration such as "500ms", "90s", "10m", "1h" or "7d"')
        value = timedelta(seconds=float(match[1]) * _UNIT_SECONDS[match[2]])
        if not shortest <= value <= longest:
            self.refuse(f"must be a duration from {shortest} to {longest}")
        return value

    def instant(self) -> datetime:
        """Return a point in time with its offset from UTC, which TOML writes without quotes."""
        if not isinstance(self._value, datetime) or self._value.tzinfo is None:
            self.refuse("must be a time with an offset, without quotes, such as 2027-01-31T00:00:00Z")
        return self._value

    def items(self) -> Iterator[Value]:
        """Yield the values of an array."""
        if not isinstance(self._value, list):
            self.refuse("must be an array")
        for index, value in enumerate(self._value):
            yield Value(self._document, (*self._keys, index), value)

    def entries(self) -> dict[str, Value]:
        """Return the values of a table, which may have any keys."""
        if not isinstance(self._value, dict):
            self.refuse("must be a table")
        return {key: Value(self._document, (*self._keys, key), value) for key, value in self._value.items()}

    def table(self, required: Collection[str] = (), optional: Collection[str] = ()) -> dict[str, Value]:
        """Return the values of a table that has all `required` keys and no others than the `optional` ones."""
        entries = self.entries()
        for key, value in entries.items():
            if key not in required and key not in optional:
                value.refuse(f"there is no such setting; {_advice(key, [*required, *optional])}")
        if missing := [key for key in required if key not in entries]:
            self.refuse(f"{' and '.join(missing)} missing: add {', '.join(f'{key} = …' for key in missing)}")
        return entries

    def stanzas(self, required: Collection[str] = (), optional: Collection[str] = ()) -> Iterator[dict[str, Value]]:
        """Yield the tables of an array that is written `[[name]]`, each as of `table`."""
        if not isinstance(self._value, list) or not all(isinstance(each, dict) for each in self._value):
            self.refuse(f"must be stanzas that begin with [[{self.name}]]")
        for each in self.items():
            yield each.table(required, optional)


Reader: TypeAlias = Callable[[Value], Any]


def read_toml(path: str, sections: Mapping[str, Reader]) -> dict[str, Any]:
    """Return what each reader makes of its section of a file, as `Document.read`.

    Raises:
        FileError: the file cannot be used.
    """
    return Document(path).read(sections)


def _text_of(path: str) -> str:
    try:
        text = read_file(path).decode()
    except UnicodeDecodeError:
        raise FileError(f"{path} is not UTF-8; save it as such") from None
    except (OSError, ValueError) as error:
        raise FileError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return text.replace("\r\n", "\n")


def parse_toml(text: str) -> dict[str, Any]:
    """Return what the parser makes of a text; ValueError: it is not TOML."""
    return tomllib.loads(text)


def _spell_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else repr(key)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _advice(word: str, known: Iterable[str]) -> str:
    """Return the known word that was probably meant, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(word.lower(), known, n=1)
    return f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}"
