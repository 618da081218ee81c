"""What users install: the wheel, built from the sdist, in an environment of its own, away from the checkout."""

from __future__ import annotations

import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

pytestmark = [pytest.mark.wheel, pytest.mark.timeout(300)]

USE_THE_CLIENT = """
import sys
from jobstatus_grpc import JobStatusClient

with JobStatusClient(sys.argv[1]) as client:
    job = client.create(name="packed")
    assert client.get(job.id) == job
print(sys.modules["jobstatus_grpc"].__file__)
"""


@pytest.fixture(scope="module")
def wheel(run, root, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, root, folder=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module", params=["newest", "floors"])
def installed(run, request, wheel, floors, tmp_path_factory) -> Path:
    """The bin folder of an environment with the wheel, and with the newest or the oldest dependencies allowed."""
    folder = tmp_path_factory.mktemp(request.param)
    oldest = "".join(f"{name}=={version}\n" for name, version in floors.items())
    (folder / "constraints.txt").write_text(oldest if request.param == "floors" else "")
    run(sys.executable, "-m", "venv", folder / "venv", folder=folder)
    pip = [folder / "venv/bin/python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run(*pip, "install", "--constraint", "constraints.txt", wheel, folder=folder)
    return folder / "venv/bin"


def test_it_ships_the_api_as_text_and_as_descriptors(wheel, root):
    with ZipFile(wheel) as archive:
        proto, descriptors = (
            archive.read(f"jobstatus/v1/{name}") for name in ("job_status.proto", "descriptor_set.binpb")
        )
    assert proto == (root / "protos/jobstatus/v1/job_status.proto").read_bytes()
    assert descriptors == (root / "generated/jobstatus/v1/descriptor_set.binpb").read_bytes()


def test_it_ships_types_sql_and_licence_and_nothing_beside(wheel, root):
    with ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {"jobstatus/py.typed", "jobstatus_grpc/py.typed"} <= set(names)
    assert [name for name in names if name.endswith("/licenses/LICENSE")]
    schemas = {str(path.relative_to(root)) for path in (root / "jobstatus_grpc/stores").rglob("*.sql")}
    assert schemas
    assert schemas <= set(names)
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"jobstatus", "jobstatus_grpc"}


def test_its_command_explains_itself(run, installed, tmp_path):
    assert "serve" in run(installed / "jobstatus", "--help", folder=tmp_path)


def test_its_client_talks_to_its_server(run, installed, serving, tmp_path):
    with serving(installed / "jobstatus", tmp_path) as address:
        where = run(installed / "python", "-I", "-c", USE_THE_CLIENT, address, folder=tmp_path)
    assert where.startswith(str(installed.parent))
