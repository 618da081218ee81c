"""The .proto files with plain protoc, for clients in other languages. The examples compile what four of them get."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

LANGUAGES = ["cpp", "csharp", "java", "kotlin", "objc", "php", "pyi", "python", "ruby"]

# The start of a class in generated code, and the name of an accessor in it.
ACCESSORS = {
    "cpp": (r"^class .*\bfinal : ", r"\b(\w+)\(\) const;"),
    "csharp": (r"^  public sealed partial class", r"^    public [\w.<>]+ (\w+) \{$"),
    "objc": (r"^GPB_FINAL @interface", r"^@property\(.*\b(\w+);$"),
}

pytestmark = pytest.mark.proto


@pytest.fixture
def generate(run, root, tmp_path):
    """Return the texts of the files that protoc generates for a language."""

    def texts(language: str, protos: Path) -> list[str]:
        options = [f"--proto_path={protos}", f"--{language}_out={tmp_path}"]
        run(root / ".venv-proto" / "bin" / "protoc", *options, *protos.rglob("*.proto"), folder=root)
        return [path.read_text(encoding="utf-8") for path in tmp_path.rglob("*") if path.is_file()]

    return texts


@pytest.mark.parametrize("protos", ["protos", "examples/protos"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_code_is_generated_for_each_language(generate, root, language, protos):
    assert any(generate(language, root / protos))


@pytest.mark.parametrize("language", ACCESSORS)
def test_no_class_has_two_accessors_of_one_name(generate, root, language):
    start, accessor = ACCESSORS[language]
    classes = [part for text in generate(language, root / "protos") for part in re.split(start, text, flags=re.M)[1:]]
    names = [Counter(re.findall(accessor, part, flags=re.M)) for part in classes]
    assert any("progress" in str(each).lower() for each in names)
    assert [name for each in names for name, count in each.items() if count > 1] == []
