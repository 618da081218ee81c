"""The file of profiles: for each server by name what the flags that connect to it would say.

current = "prod"

[profiles.prod]
address = "grpcs://jobs.example.com"
token_file = "prod.token"
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import click

from jobstatus_grpc.cli import parsers
from jobstatus_grpc.toml_file import FileError, Value, parse_toml, read_toml

TIMEOUT = parsers.duration(shortest=timedelta(milliseconds=1), longest=timedelta(days=365))

SECRETS = ("token", "token_command")
"""Settings that are not printed: a command may hold a secret in its arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profiles:
    """What the file says."""

    current: str | None = None
    """The profile of commands that name neither a profile nor an address."""
    profiles: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)
    """Name → setting, the name of a flag with `_` for `-` → what the flag's argument gets."""

    def find(self, name: str) -> Mapping[str, Any]:
        """Return the settings of a profile.

        Raises:
            FileError: there is none of this name.
        """
        if name in self.profiles:
            return self.profiles[name]
        near = difflib.get_close_matches(name, self.profiles, n=1)
        there_are = f"there are: {', '.join(self.profiles) or 'none'}"
        advice = f"did you mean {near[0]}?" if near else f"{there_are}; make it with jobstatus profile set"
        raise FileError(f"there is no profile {name!r} in {file_path()}; {advice}")


def file_path() -> Path:
    """Return the path of the file, which need not exist."""
    if named := os.environ.get("JOBSTATUS_CONFIG"):
        return Path(named)
    folder = os.environ.get("XDG_CONFIG_HOME") or ""
    # A relative one has to be ignored, says its specification.
    # Path.expanduser raises an error for a user without a home, as in many containers.
    folder = folder if os.path.isabs(folder) else os.path.expanduser("~/.config")
    return Path(folder, "jobstatus", "config.toml")


def read() -> Profiles:
    """Return what the file says; without a file, that there are no profiles.

    Raises:
        FileError: it cannot be read, or is wrong; the message names the line and the setting.
    """
    path = file_path()
    if not os.path.exists(path):  # Path.exists raises an error for a folder that is closed to this user
        return Profiles()
    profiles = Profiles(**read_toml(str(path), _SECTIONS))
    if profiles.current is not None:
        profiles.find(profiles.current)
    return profiles


def check_name(name: str) -> str:
    """Return the name of a profile, which a key of TOML can have without quotes."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise click.BadParameter(f"{name!r} is not a name; write 1 to 64 letters, digits, - and _")
    return name


def save(name: str, settings: Mapping[str, Any]) -> None:
    """Write a profile in place of one with its name; the comments within that one are lost, all others stay.

    Raises:
        FileError: the file is wrong, or written in a way that cannot be changed by this.
        OSError: it cannot be written.
    """
    lines = [f"[profiles.{name}]", *(f"{key} = {_spell(value)}" for key, value in settings.items())]

    def change(text: str) -> str:
        block = "\n".join(lines) + "\n"
        if (begin_end := _block(text, name)) is not None:
            begin, end = begin_end
            return text[:begin] + block + text[end:]
        gap = "" if not text else "\n" if text.endswith("\n") else "\n\n"
        return text + gap + block

    _edit(change, lambda found: found.setdefault("profiles", {}).update({name: dict(settings)}))


def delete(name: str) -> None:
    """Remove a profile; if it is the current one, there is none afterwards. Errors are those of `save`."""

    def change(text: str) -> str:
        begin, end = _block(text, name) or (0, 0)
        text = text[:begin] + text[end:].removeprefix("\n")
        return re.sub(rf'^current *= *"{name}".*\n?', "", text, flags=re.MULTILINE)

    def expect(found: dict[str, Any]) -> None:
        found["profiles"].pop(name)
        if found.get("current") == name:
            found.pop("current")

    _edit(change, expect)


def use(name: str) -> None:
    """Make a profile the current one. Errors are those of `save`."""

    def change(text: str) -> str:
        line = f'current = "{name}"'
        text, count = re.subn(r"^current *=.*$", line, text, count=1, flags=re.MULTILINE)
        return text if count else f"{line}\n\n{text}"

    _edit(change, lambda found: found.update(current=name))


def as_written() -> dict[str, dict[str, Any]]:
    """Return the settings of all profiles as they are in the file, which must be good."""
    found: dict[str, dict[str, Any]] = parse_toml(_text()).get("profiles", {})
    return found


def _edit(change: Callable[[str], str], expect: Callable[[dict[str, Any]], None]) -> None:
    """Replace the file's text by `change` of it, if that makes of its contents what `expect` does."""
    read()
    text = _text()
    wanted = parse_toml(text)
    expect(wanted)
    changed = change(text)
    try:
        is_right = _without_empty(parse_toml(changed)) == _without_empty(wanted)
    except ValueError:
        is_right = False
    if not is_right:
        raise FileError(f"{file_path()} is written in a way that this command cannot change; edit it by hand")
    _write(changed)


def _without_empty(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if value != {}}


def _text() -> str:
    path = file_path()
    return path.read_text(encoding="utf-8") if os.path.exists(path) else ""


def _write(text: str) -> None:
    """Replace the file whole, readable by its user alone; if it is a link, what it leads to."""
    path = Path(os.path.realpath(file_path()))
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    number, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # has mode 0600
    try:
        with open(number, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _block(text: str, name: str) -> tuple[int, int] | None:
    """Return where the table of a profile begins and ends, without the comments and empty lines before the next."""
    found = re.search(rf"^\[profiles\.{name}\].*\n?(?:(?!\[).*\n?)*", text, re.MULTILINE)
    if found is None:
        return None
    block = re.sub(r"(?:\s*^[ \t]*(?:#.*)?$)+\s*\Z", "", found[0], flags=re.MULTILINE)
    end = found.start() + len(block)
    return found.start(), end + 1 if text[end : end + 1] == "\n" else end


def _spell(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return f"[{', '.join(map(_spell, value))}]"


def _path(value: Value) -> str:
    """Return a path; a relative one is relative to the file of profiles."""
    return str(file_path().parent.absolute() / Path(os.path.expanduser(value.text())))


def _parsed(parse: Callable[[str], Any]) -> Callable[[Value], Any]:
    """Return a reader of a text that the flag's parser takes."""

    def read(value: Value) -> Any:
        try:
            return parse(value.text())
        except click.BadParameter as error:
            value.refuse(error.message)

    return read


def _command(value: Value) -> str | tuple[str, ...]:
    """Return a command: a text that is split as a shell does, or its words."""
    return value.texts() if isinstance(value.plain(), list) else value.text()


READERS: Mapping[str, Callable[[Value], Any]] = {
    "address": _parsed(parsers.address),
    "token": Value.text,
    "token_file": _path,
    "token_command": _command,
    "tenant": Value.text,
    "ca": _path,
    "cert": _path,
    "key": _path,
    "server_name": Value.text,
    "insecure": Value.flag,
    "timeout": _parsed(TIMEOUT),
}
"""The settings of a profile: the flags that connect to the server."""

TOKENS = ("token", "token_file", "token_command")


def _profile(value: Value) -> dict[str, Any]:
    entries = value.table(required=["address"], optional=READERS)
    if len(tokens := [key for key in TOKENS if key in entries]) > 1:
        entries[tokens[1]].refuse(f"contradicts {tokens[0]}; remove one of them")
    if ("cert" in entries) != ("key" in entries):
        value.refuse("cert and key go together")
    return {key: READERS[key](entry) for key, entry in entries.items()}


_SECTIONS: Mapping[str, Callable[[Value], Any]] = {
    "current": Value.text,
    "profiles": lambda value: {name: _profile(each) for name, each in value.entries().items()},
}
