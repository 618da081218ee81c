"""The pages of reference on the documentation site, each generated from the source: `make docs` calls PAGES."""

from __future__ import annotations

import inspect
import re
import tempfile
import urllib.request
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import click
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)
from prometheus_client.parser import text_string_to_metric_families

from jobstatus_grpc.auth import chain
from jobstatus_grpc.cli import COMMANDS, jobstatus
from jobstatus_grpc.errors import RetryableError, error_classes
from jobstatus_grpc.server import limits
from jobstatus_grpc.toml_file import Value
from jobstatus_grpc.web import openapi
from jobstatus_grpc.web.http import PROBLEM_TYPE
from jobstatus_grpc.wire.status import code_of
from tests.support.auth import AuthText
from tests.support.certificates import Authority
from tests.support.servers import ServerProcess

GENERATED = "This page is generated from the source."


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of Markdown; a cell may have several lines."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines) + "\n"


def _cell(text: str) -> str:
    return "<br>".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", text.strip())).replace("|", "\\|")


# The API


def proto() -> str:
    """Return all services, messages, fields and enums of the .proto, with their comments."""
    files = FileDescriptorSet.FromString(resources.files("jobstatus.v1").joinpath("descriptor_set.binpb").read_bytes())
    parts = ["# Protocol buffers", GENERATED]
    for file in files.file:
        if file.package == "jobstatus.v1":
            parts += _file(file)
    return "\n\n".join(parts) + "\n"


def _file(file: FileDescriptorProto) -> Iterator[str]:
    comments = {tuple(each.path): each.leading_comments.strip("\n") for each in file.source_code_info.location}
    yield f"`{file.name}`, package `{file.package}`."
    # The numbers of a path are fields of FileDescriptorProto and its parts, as descriptor.proto says.
    for number, service in enumerate(file.service):
        yield from _service(service, (6, number), comments)
    for number, message in enumerate(file.message_type):
        yield from _message(message, (4, number), comments)
    for number, enum in enumerate(file.enum_type):
        yield from _enum(enum, (5, number), comments)


Comments = Mapping[tuple[int, ...], str]


def _part(path: tuple[int, ...], number: int) -> tuple[int, ...]:
    """Return the path of a method, field or value: they are field 2 of services, messages and enums."""
    return (*path, 2, number)


def _paragraphs(comment: str) -> str:
    """Return a comment as Markdown: its lines start with the space after `//`."""
    return inspect.cleandoc(comment.replace("\n ", "\n").strip())


def _service(service: ServiceDescriptorProto, path: tuple[int, ...], comments: Comments) -> Iterator[str]:
    yield f"## {service.name}"
    yield _paragraphs(comments[path])
    for number, method in enumerate(service.method):
        yield f"### {method.name}"
        stream = "a stream of " if method.server_streaming else ""
        yield f"{_type_link(method.input_type)} → {stream}{_type_link(method.output_type)}"
        yield _paragraphs(comments[_part(path, number)])


def _message(message: DescriptorProto, path: tuple[int, ...], comments: Comments) -> Iterator[str]:
    yield f"## {message.name}"
    yield _paragraphs(comments[path])
    entries = {each.name: each for each in message.nested_type if each.options.map_entry}
    rows = [
        (str(field.number), f"`{field.name}`", _type(field, entries), comments[_part(path, number)])
        for number, field in enumerate(message.field)
    ]
    if rows:
        yield table(["number", "field", "type", ""], rows)


def _enum(enum: EnumDescriptorProto, path: tuple[int, ...], comments: Comments) -> Iterator[str]:
    yield f"## {enum.name}"
    yield _paragraphs(comments[path])
    rows = [
        (str(value.number), f"`{value.name}`", comments[_part(path, number)]) for number, value in enumerate(enum.value)
    ]
    yield table(["number", "value", ""], rows)


def _type(field: FieldDescriptorProto, entries: Mapping[str, DescriptorProto]) -> str:
    name = field.type_name.rpartition(".")[2]
    if name in entries:
        key, value = (_type(each, {}) for each in entries[name].field)
        return f"map of {key} to {value}"
    text = _type_link(field.type_name) if name else FieldDescriptorProto.Type.Name(field.type).lower()[len("type_") :]
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {text}"
    return f"optional {text}" if field.proto3_optional else text


def _type_link(full_name: str) -> str:
    package, _, name = full_name.removeprefix(".").rpartition(".")
    return f"[{name}](#{name.lower()})" if package == "jobstatus.v1" else f"`{package}.{name}`"


# The command line


def command_line() -> str:
    """Return all commands with their flags."""
    parts = ["# Commands and flags", GENERATED, _help_of(jobstatus)]
    for name, command in commands():
        usage = " ".join(command.collect_usage_pieces(click.Context(command)))
        parts += [f"## {name}", f"```text\njobstatus {name} {usage}\n```", _help_of(command)]
        rows = [(_spelling(flag), _default(flag), flag.help or "") for flag in flags_of(command)]
        if rows:
            parts.append(table(["flag", "default", ""], rows))
    return "\n\n".join(parts) + "\n"


def commands() -> Iterator[tuple[str, click.Command]]:
    """Yield all commands, and those of groups as `token new`."""
    for name in COMMANDS:
        command = jobstatus.get_command(click.Context(jobstatus), name)
        assert command is not None
        yield name, command
        if isinstance(command, click.Group):
            yield from ((f"{name} {inner}", each) for inner, each in command.commands.items())


def flags_of(command: click.Command) -> list[click.Option]:
    """Return the flags of a command that its help shows."""
    return [each for each in command.params if isinstance(each, click.Option) and not each.hidden]


def _help_of(command: click.Command) -> str:
    """Return the text of a command's help, its paragraphs that are not to be wrapped as blocks."""
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    return "\n\n".join(
        f"```text\n{paragraph.removeprefix(chr(8)).strip(chr(10))}\n```" if paragraph.startswith("\b") else paragraph
        for paragraph in paragraphs
    )


def _spelling(flag: click.Option) -> str:
    metavar = "" if flag.is_flag else f" {flag.make_metavar(click.Context(jobstatus))}"
    return f"`{', '.join([*flag.opts, *flag.secondary_opts])}{metavar}`"


def _default(flag: click.Option) -> str:
    shown = flag.show_default is not False and not flag.is_flag
    default = flag.to_info_dict()["default"] if shown else None
    values = default if isinstance(default, list | tuple) else [default]
    return ", ".join(f"`{value}`" for value in values if isinstance(value, str | int | float) and value != "")


def variables_of(flag: click.Option) -> Sequence[str]:
    """Return the variables that set a flag."""
    return [flag.envvar] if isinstance(flag.envvar, str) else flag.envvar or []


# HTTP


def http() -> str:
    """Return the operations of the OpenAPI description."""
    document = openapi.document()
    parts = ["# HTTP", f"{GENERATED} A server with `--http` has it at `/openapi.json`, in OpenAPI 3.1."]
    parts.append(document["info"]["description"])
    problems: dict[str, str] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if method != "parameters":
                parts += _operation(f"{method.upper()} {path}", operation, document)
                problems.update(_replies(operation, document, are_problems=True))
    parts += ["## Problems", f"As `{PROBLEM_TYPE}`, of RFC 9457.", table(["status", ""], sorted(problems.items()))]
    parts.append("## Schemas")
    for name, schema in document["components"]["schemas"].items():
        rows = [
            (f"`{field}`", _schema(of), of.get("description", "")) for field, of in schema.get("properties", {}).items()
        ]
        parts += [f"### {name}", schema.get("description", ""), table(["member", "type", ""], rows) if rows else ""]
    return "\n\n".join(filter(None, parts)) + "\n"


def _operation(title: str, operation: Mapping[str, Any], document: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {title}"
    yield f"`{operation['operationId']}`. {operation.get('summary', '')} {operation.get('description', '')}".strip()
    parameters = [_resolved(each, document) for each in operation.get("parameters", [])]
    if parameters:
        rows = [
            (f"`{each['name']}`", each["in"], _schema(each["schema"]), each.get("description", ""))
            for each in parameters
        ]
        yield table(["parameter", "in", "type", ""], rows)
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        yield f"The body is `{kind}`: {_schema(content['schema'])}."
    yield table(["status", ""], _replies(operation, document, are_problems=False).items())
    yield f"[Problems](#problems): {', '.join(_replies(operation, document, are_problems=True))}."


def _replies(operation: Mapping[str, Any], document: Mapping[str, Any], *, are_problems: bool) -> dict[str, str]:
    """Return the description of each reply by its status."""
    replies = {str(code): _resolved(reply, document) for code, reply in operation["responses"].items()}
    return {
        code: reply["description"]
        for code, reply in replies.items()
        if (PROBLEM_TYPE in reply.get("content", {})) == are_problems
    }


def _resolved(part: Mapping[str, Any], document: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Any = document
    if "$ref" not in part:
        return part
    for name in part["$ref"].removeprefix("#/").split("/"):
        found = found[name]
    return found


def _schema(schema: Mapping[str, Any]) -> str:
    """Return a schema in words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(map(_schema, choices))
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if "items" in schema:
        return f"array of {_schema(schema['items'])}"
    kinds = schema.get("type", "any")
    text = kinds if isinstance(kinds, str) else " or ".join(kinds)
    limits = [f"{word} {schema[key]}" for key, word in _LIMITS.items() if key in schema]
    return ", ".join([schema.get("format", text), *limits])


_LIMITS = {"minimum": "at least", "maximum": "at most", "minLength": "length from", "maxLength": "length to"}


# Metrics


def metrics() -> str:
    """Return the metrics that a server with all optional parts serves."""
    rows = [
        (f"`{name}`", kind, ", ".join(f"`{label}`" for label in labels), text)
        for name, kind, labels, text in metric_families()
    ]
    return f"# Metrics\n\n{GENERATED}\n\n{table(['metric', 'type', 'labels', ''], rows)}"


def metric_families() -> Iterator[tuple[str, str, Sequence[str], str]]:
    """Yield name, type, labels and help of each metric, read from a server that has TLS, --auth and [limits]."""
    with tempfile.TemporaryDirectory() as folder:
        auth, (cert, key) = AuthText(Path(folder, "auth.toml")), Authority().issue().write(Path(folder), "server")
        auth.admit("scraped")
        with auth.path.open("a") as file:
            file.write("[limits]\ncalls_per_second = 1000\n")
        log = Path(folder, "log")
        flags = ["--metrics", "127.0.0.1:0", "--auth", str(auth.path), "--log-format", "text"]
        with ServerProcess(*flags, "--tls-cert", cert, "--tls-key", key, log=log):
            found = re.search(r"metrics on (\S+)", log.read_text())
            assert found is not None
            text = urllib.request.urlopen(found[1]).read().decode()
    for family in text_string_to_metric_families(text):
        labels = dict.fromkeys(label for sample in family.samples for label in sample.labels if label != "le")
        name = f"{family.name}_total" if family.type == "counter" else family.name
        yield name, family.type, list(labels), family.documentation


# Configuration


VARIABLES_WITHOUT_A_FLAG = {
    "JOBSTATUS_CONFIG": "the file of the profiles",
    "JOBSTATUS_WEBHOOK_SECRET": "of `relay`: the secret that signs requests to `--webhook`",
}


def configuration() -> str:
    """Return the variables of each flag, and the settings of the files."""
    variables: dict[str, dict[str, list[str]]] = {}
    for name, command in commands():
        for flag in flags_of(command):
            for variable in variables_of(flag):
                variables.setdefault(variable, {}).setdefault(flag.opts[-1], []).append(name)
    rows = [
        (f"`{variable}`", _names(flags), ", ".join(dict.fromkeys(name for names in flags.values() for name in names)))
        for variable, flags in sorted(variables.items())
    ]
    without_a_flag = ((f"`{name}`", text) for name, text in VARIABLES_WITHOUT_A_FLAG.items())
    settings = [(f"`{section}`", _names(required), _names(optional)) for section, required, optional in auth_settings()]
    return "\n\n".join([
        "# Configuration",
        GENERATED,
        "## Variables",
        "A flag wins over its variable. A variable of a repeated flag has one value per line.",
        table(["variable", "flag", "of the commands"], rows),
        table(["variable without a flag", ""], without_a_flag),
        "## The file of `serve --auth`",
        "[Security](../security.md) describes the settings; `role` is `watcher`, `worker`, `operator` or `admin`.",
        table(["section", "required", "optional"], settings),
        "## Profiles",
        "`jobstatus profile set` writes them to the file in `JOBSTATUS_CONFIG`, by default `jobstatus/config.toml` in "
        "`$XDG_CONFIG_HOME` or in `~/.config`: see [Profiles](../security.md#profiles).",
    ])  # fmt: skip


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


class _Section(Value):
    """A section without values, which records the keys that its reader takes."""

    __slots__ = ("settings",)

    def __init__(self, settings: list[tuple[Collection[str], Collection[str]]]) -> None:
        self.settings = settings

    def stanzas(self, required: Collection[str] = (), optional: Collection[str] = ()) -> Iterator[dict[str, Value]]:
        self.settings.append((required, optional))
        return iter(())

    def table(self, required: Collection[str] = (), optional: Collection[str] = ()) -> dict[str, Value]:
        self.settings.append((required, optional))
        return {}

    def entries(self) -> dict[str, Value]:
        self.settings.append(((), ("metadata", "cache", "…")))
        return {}


def auth_settings() -> Iterator[tuple[str, Collection[str], Collection[str]]]:
    """Yield each section of the file of --auth with its required and its optional settings."""
    readers: Mapping[str, Callable[[Value], Any]] = {**chain.readers(), limits.SECTION: limits.read_limits}
    for name, read in readers.items():
        settings: list[tuple[Collection[str], Collection[str]]] = []
        read(_Section(settings))
        spelled = {"authenticators": "[authenticators.NAME]", limits.SECTION: f"[{limits.SECTION}]"}
        for required, optional in settings:
            yield spelled.get(name, f"[[{name}]]"), required, optional


# Errors


def errors() -> str:
    """Return each reason with its code, message, and advice."""
    rows = []
    for cls in (each for each in error_classes() if vars(each).get("reason")):
        message, advice = message_and_advice(cls)
        delay = f"{cls.retry_after_seconds:g} s" if issubclass(cls, RetryableError) else ""
        names = f"`{cls.reason}`\n\n{code_of(cls()).name}\n\n`{cls.__name__}`"
        rows.append((names, message, advice, delay))
    return "\n\n".join([
        "# Errors",
        f"{GENERATED} [Errors](../api.md#errors) has what they have in common.",
        table(["reason, code, class in Python", "message", "what to do", "delay in RetryInfo"], rows),
        "Most errors say which job, field or limit it was, instead of the message here.",
    ])  # fmt: skip


def message_and_advice(cls: type) -> tuple[str, str]:
    """Return the first sentence of an error's docstring, and the others: what a caller can do."""
    sentences = re.split(r"(?<=\.)\s+", inspect.cleandoc(cls.__doc__ or ""), maxsplit=1)
    return sentences[0], "".join(sentences[1:])


PAGES: Mapping[str, Callable[[], str]] = {
    "reference/proto.md": proto,
    "reference/command-line.md": command_line,
    "reference/http.md": http,
    "reference/metrics.md": metrics,
    "reference/configuration.md": configuration,
    "reference/errors.md": errors,
}
"""Of the site, by their path in docs/."""
