"""The documentation site: it builds without a warning, and its generated pages have everything that the source has."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import yaml
from jobstatus.v1 import job_status_pb2 as pb

from jobstatus_grpc.auth.chain import SECTIONS
from jobstatus_grpc.errors import error_classes
from jobstatus_grpc.web import openapi
from tests.support import references


@pytest.fixture(scope="module")
def reference():
    """Return the generated page of a name."""
    pages = {path.removeprefix("reference/").removesuffix(".md"): make() for path, make in references.PAGES.items()}
    return pages.__getitem__


def build(root, folder, **settings):
    (folder / "mkdocs.yml").write_text(yaml.dump({"INHERIT": str(root / "mkdocs.yml"), **settings}))
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder / "site"]
    command += ["--config-file", folder / "mkdocs.yml"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(root, tmp_path):
    done = build(root, tmp_path, docs_dir=str(root / "docs"), hooks=[str(root / "tests/support/site.py")])
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site/index.html").exists()
    assert "JobStatusService" in (tmp_path / "site/reference/proto/index.html").read_text()
    assert '"location":"source/' not in (tmp_path / "site/search/search_index.json").read_text()


@pytest.mark.slow
def test_what_is_wrong_on_a_page_fails_the_build(root, tmp_path):
    """With a page beside those of docs/, which are links."""
    (tmp_path / "docs").mkdir()
    for path in (root / "docs").iterdir():
        (tmp_path / "docs" / path.name).symlink_to(path)
    text = "# Wrong\n\n[a](gone.md), [b](api.md#gone), [c](../gone.py)\n\nA list:\n* one\n* two\n"
    (tmp_path / "docs/wrong.md").write_text(text)
    done = build(root, tmp_path, docs_dir=str(tmp_path / "docs"), hooks=[str(root / "tests/support/site.py")])
    assert done.returncode == 1
    warnings = re.findall(r"WARNING -  (.*)", done.stderr)
    wrong = ['not included in the "nav"', "'gone.md'", "'#gone'", "source/gone.py", "the list needs an empty line"]
    assert [each for each in wrong if not any(each in warning for warning in warnings)] == []


def test_every_part_of_the_api_is_in_the_reference(reference):
    page = reference("proto")
    file = pb.DESCRIPTOR
    names = [*file.message_types_by_name, *file.enum_types_by_name, *file.services_by_name]
    names += [method.name for service in file.services_by_name.values() for method in service.methods]
    assert set(names) <= set(re.findall(r"^##+ (\w+)$", page, re.MULTILINE))
    for message in file.message_types_by_name.values():
        section = page.partition(f"\n## {message.name}\n")[2].partition("\n## ")[0]
        rows = dict(re.findall(r"^\| (\d+) \| `(\w+)` \|", section, re.MULTILINE))
        assert rows == {str(field.number): field.name for field in message.fields}
    values = [value.name for enum in file.enum_types_by_name.values() for value in enum.values]
    assert all(f"| `{value}` |" in page for value in values)


def test_every_field_of_the_api_has_its_comment_in_the_reference(reference):
    rows = re.findall(r"^\| \d+ \| .*$", reference("proto"), re.MULTILINE)
    assert len(rows) > 100
    assert [row for row in rows if row.endswith("|  |")] == []


def test_every_command_and_flag_is_in_the_reference(reference):
    page = reference("command-line")
    for name, command in references.commands():
        section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        missing = [flag.opts for flag in references.flags_of(command) if flag.opts[-1] not in section]
        assert section
        assert not missing, name


def test_every_operation_of_the_web_side_is_in_the_reference(reference):
    page = reference("http")
    for path, operations in openapi.document()["paths"].items():
        for method in operations.keys() - {"parameters"}:
            assert f"\n## {method.upper()} {path}\n" in page


def test_every_metric_is_in_the_reference(reference, root):
    """All that the table in docs/server.md has, and all that the server's module names."""
    page = set(re.findall(r"^\| `(\w+)` \|", reference("metrics"), re.MULTILINE))
    source = (root / "jobstatus_grpc/server/metrics.py").read_text()
    table = (root / "docs/server.md").read_text().partition("| metric |")[2]
    named = set(re.findall(r'"((?:jobstatus|grpc_server)_\w+)"', source))
    assert len(named) > 20
    assert {name for name in named if not {name, f"{name}_total"} & page} == set()
    assert set(re.findall(r"`((?:jobstatus|grpc_server)_\w+)`", table)) == {
        name for name in page if not name.startswith(("process_", "python_"))
    }


def test_every_variable_is_in_the_reference(reference, root):
    page = reference("configuration")
    sources = [path.read_text() for path in (root / "jobstatus_grpc").rglob("*.py")]
    named = {name for text in sources for name in re.findall(r'"(JOBSTATUS_[A-Z_]*[A-Z])"', text)}
    assert len(named) > 5
    assert [name for name in named if f"`{name}`" not in page] == []


def test_every_section_of_the_auth_file_is_in_the_reference(reference):
    settings = {section: required for section, required, _ in references.auth_settings()}
    assert len(settings) == len(SECTIONS) + 1
    assert settings["[[tokens]]"] == ("name", "sha256", "role")
    assert all(f"`{section}`" in reference("configuration") for section in settings)


def test_every_error_is_in_the_reference_with_what_to_do(reference):
    for cls in error_classes():
        if reason := vars(cls).get("reason"):
            (row,) = re.findall(rf"^\| `{reason}`<br>.*$", reference("errors"), re.MULTILINE)
            message, advice = references.message_and_advice(cls)
            assert f"| {message} | " in row
            assert advice, f"the docstring of {cls.__name__} in errors.py does not say what to do"
