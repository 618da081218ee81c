"""What make release publishes, and the form of the changelog."""

from __future__ import annotations

import json
import re

import pytest

from tests.support.release import version

HEADING = re.compile(r"\[Unreleased\]|\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d")
KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_changelog_has_the_form_of_keep_a_changelog(root):
    text = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert [heading for heading in headings if not HEADING.fullmatch(heading)] == []
    for section in re.split(r"^## .*$", text, flags=re.MULTILINE)[1:]:
        kinds = re.findall(r"^### (.*)$", section, re.MULTILINE)
        assert len(kinds) == len(set(kinds)), "a kind of change twice in one section"
        assert set(kinds) <= KINDS


def test_the_manifests_name_the_image_of_this_version(root):
    overlays = list((root / "deploy/kubernetes/overlays").glob("*/kustomization.yaml"))
    assert overlays
    assert {tag for path in overlays for tag in re.findall(r"newTag: ([\d.]+)", path.read_text())} == {version()}


@pytest.mark.release
def test_the_bill_of_materials_names_what_the_package_needs(pytestconfig, floors):
    folder = pytestconfig.getoption("--built") or pytest.skip("make release writes it, and names its folder in --built")
    (path,) = folder.glob("*.cdx.json")
    bill = json.loads(path.read_text())
    assert bill["metadata"]["component"]["version"] == version()
    named = {component["name"].replace("_", "-"): component for component in bill["components"]}
    assert floors.keys() | {"asyncpg", "cryptography", "uvicorn"} <= named.keys()
    assert all(component["purl"] and component["version"] for component in named.values())
    assert "file://" not in path.read_text()
