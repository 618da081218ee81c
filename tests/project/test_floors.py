"""Generated modules refuse a run time older than their generator: our requirements must say the same."""

from __future__ import annotations

import re


def generated_versions(root, pattern: str, glob: str) -> set[str]:
    """Return the versions that `pattern`'s groups find in each generated module that matches `glob`."""
    found = [re.search(pattern, path.read_text()) for path in (root / "generated").rglob(glob)]
    assert found
    return {".".join(match.groups()) if match else "none" for match in found}


def test_the_protobuf_floor_is_what_generated_messages_need(root, floors):
    pattern = r"Domain\.PUBLIC,\s*(\d+),\s*(\d+),\s*(\d+),"
    assert generated_versions(root, pattern, "*_pb2.py") == {floors["protobuf"]}


def test_the_grpcio_floor_is_what_generated_stubs_need(root, floors):
    pattern = r"GRPC_GENERATED_VERSION = '([\d.]+)'"
    assert generated_versions(root, pattern, "*_pb2_grpc.py") == {floors["grpcio"]}


def test_all_grpcio_packages_have_one_floor(floors):
    assert {version for name, version in floors.items() if name.startswith("grpcio")} == {floors["grpcio"]}
