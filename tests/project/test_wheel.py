"""What users install: the wheel, built from the sdist, in an environment of its own, away from the checkout."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.support.pythons import VERSIONS, find_python

pytestmark = [pytest.mark.wheel, pytest.mark.timeout(300)]

USE_THE_CLIENT = """
import sys
from jobstatus_grpc import JobState, JobStatusClient

with JobStatusClient(sys.argv[1]) as client:
    job = client.create(name="packed")
    client.update(job.id, state=JobState.IN_PROGRESS, progress=50)
    watch = client.watch(job.id)
    assert next(watch).progress == 50
    client.update(job.id, state=JobState.SUCCEEDED)
    assert [seen.state for seen in watch][-1] is JobState.SUCCEEDED
print(sys.modules["jobstatus_grpc"].__file__)
"""


@pytest.fixture(scope="module")
def build(run, root, tmp_path_factory) -> Callable[[Path], Path]:
    """`build(source)` builds sdist and wheel as `make wheel` does, and returns the folder that they are in."""
    epoch = f"SOURCE_DATE_EPOCH={run('git', 'log', '-1', '--format=%ct', folder=root).strip()}"

    def built(source: Path) -> Path:
        folder = tmp_path_factory.mktemp("dist")
        run("env", epoch, sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source, folder=folder)
        return folder

    return built


@pytest.fixture(scope="module")
def dist(pytestconfig, build, root) -> Path:
    """The folder with sdist and wheel."""
    return pytestconfig.getoption("--built") or build(root)


@pytest.fixture(scope="module")
def wheel(dist) -> Path:
    (built,) = dist.glob("*.whl")
    return built.resolve()


@pytest.fixture(
    scope="module",
    params=["newest", "floors", *(pytest.param(each, marks=pytest.mark.release) for each in VERSIONS)],
)
def installed(run, request, wheel, floors, tmp_path_factory) -> Path:
    """The bin folder of an environment with the wheel: with the newest dependencies, the oldest, another Python."""
    folder = tmp_path_factory.mktemp(request.param)
    oldest = "".join(f"{name}=={version}\n" for name, version in floors.items())
    (folder / "constraints.txt").write_text(oldest if request.param == "floors" else "")
    python = find_python(request.param) if request.param in VERSIONS else sys.executable
    if python is None:
        pytest.skip(f"Python {request.param} is not installed")
    run(python, "-m", "venv", "--without-pip", folder / "venv", folder=folder)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", folder / "venv"]
    run(*pip, "install", "--constraint", "constraints.txt", wheel, folder=folder)
    return folder / "venv/bin"


@pytest.fixture(scope="module")
def sources(run, root, tmp_path_factory) -> Path:
    """A copy of what is built, made at another time."""
    copy = tmp_path_factory.mktemp("sources")
    names = ["LICENSE", "README.md", "CHANGELOG.md", "buf.yaml", "pyproject.toml", ".gitignore"]
    for name in (*names, "protos", "generated", "jobstatus_grpc"):
        run("cp", "--recursive", root / name, copy, folder=copy)
    return copy


def digests(folder: Path) -> dict[str, str]:
    built = [*folder.glob("*.whl"), *folder.glob("*.tar.gz")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in built}


def test_two_builds_have_the_same_bytes(dist, build, sources):
    assert len(digests(dist)) == 2
    assert digests(dist) == digests(build(sources))


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
