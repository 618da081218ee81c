"""Every command and all code in README.md and docs/ run as written, or are listed here with the reason why not.

A block of `console` has commands after `$ `, each with the lines of its output that matter; `bash` and `python` blocks
are run as a whole, and a block of `text` directly after one is its output. In the output `…` stands for anything, and
`^C` ends a command that would go on. A block with `title="NAME"` is written to that file instead. What other languages
show is not run.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.project.conftest import ROOT
from tests.support.page import Block, Command, PageRun, blocks_of, commands_of
from tests.support.references import commands as all_commands
from tests.support.references import flags_of

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs").glob("how-to/*.md"))]

NOT_RUN = {
    r"^pip install": "another test compares the extras with pyproject.toml",
    r"^(sudo )?(docker|kubectl|sudo) ": "needs Docker, a cluster or systemd; tests/deploy checks the files",
    r"--address \S*\.example|^grpcurl[\s\S]*\.example|db\.example|\bjobs:50051": "names of machines that do not exist",
    r"^jobstatus profile \w+ prod|--profile prod": "as these; tests/cli/test_profile.py runs them",
    r"--tls-cert tls\.crt": "a certificate of the reader's own; tests/server/test_tls.py runs it",
}
"""Commands, as regular expressions, and why they are not run."""

ELSEWHERE = {
    ("docs/frameworks.md", ""): "tests/project/test_frameworks_docs.py",
    ("docs/relay.md", ""): "tests/relay/test_docs.py",
    ("docs/runbook.md", ""): "tests/deploy/test_prometheus.py",
    ("docs/security.md", "Your own authentication"): "tests/project/test_security_docs.py",
    ("docs/deployment.md", "Docker Compose"): "tests/deploy/test_container.py",
    ("docs/deployment.md", "Envoy and the native transport"): "tests/deploy/test_envoy_native.py",
}
"""Sections of pages, or whole pages, and the tests that run them: with brokers, receivers and proxies."""

MARKS: dict[str, pytest.MarkDecorator | tuple[()]] = {"docs/quickstart.md": pytest.mark.interop, "README.md": ()}
"""The quick start needs compilers; other pages are slow, all together."""

LANGUAGES_NOT_RUN = {
    *("go", "java", "js", "json", "mermaid", "nginx", "proto", "ruby", "sql", "text", "toml", "ts", "yaml"),
}
"""A block of these with a title is written to a file."""


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def why_not(page: Path, command: Command) -> str | None:
    """Return why a command is not run here; None: it is."""
    for key in ((name_of(page), ""), (name_of(page), command.section)):
        if key in ELSEWHERE:
            return ELSEWHERE[key]
    if command.language == "console":
        return next((reason for pattern, reason in NOT_RUN.items() if re.search(pattern, command.text)), None)
    return None


def commands_to_run(page: Path) -> list[Command | Block]:
    found = list(commands_of(page.read_text()))
    return [each for each in found if isinstance(each, Block) or why_not(page, each) is None]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=name_of(page), marks=MARKS.get(name_of(page), pytest.mark.slow))
        for page in PAGES
        if commands_to_run(page)
    ],
)
def test_the_commands_and_code_of_a_page_run(page, root, tmp_path):
    with PageRun(page.read_text(), tmp_path, checkout=root) as run:
        for each in commands_to_run(page):
            if isinstance(each, Block):
                run.write(each)
            else:
                run.run(each)


def test_every_block_has_a_language_that_is_known():
    languages = {"bash", "console", "python", "sh", *LANGUAGES_NOT_RUN}
    unknown = [
        (name_of(page), block.line)
        for page in PAGES
        for block in blocks_of(page.read_text())
        if block.language not in languages
    ]
    assert unknown == []


def test_every_reason_is_needed():
    commands = [each for page in PAGES for each in commands_of(page.read_text()) if isinstance(each, Command)]
    assert [pattern for pattern in NOT_RUN if not any(re.search(pattern, each.text) for each in commands)] == []
    for (page, section), test in ELSEWHERE.items():
        assert any(not section or block.section == section for block in blocks_of((ROOT / page).read_text()))
        assert Path(page).name in (ROOT / test).read_text()


def test_every_extra_that_is_named_exists(root):
    extras = re.findall(r"jobstatus-grpc\[([\w,]+)\]", "".join(page.read_text() for page in PAGES))
    text = (root / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    known = re.findall(r"^(\w+) = \[", text.partition("\n[project.")[0], re.MULTILINE)
    assert {name for names in extras for name in names.split(",")} <= set(known)


def test_every_flag_in_the_table_of_the_server_exists(root):
    table = (root / "docs/server.md").read_text().partition("| flag of `serve`")[2].partition("\n## ")[0]
    serve = dict(all_commands())["serve"]
    assert set(re.findall(r"`(--[a-z-]+)`", table)) == {flag.opts[-1] for flag in flags_of(serve)}
