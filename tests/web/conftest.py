"""Servers with an HTTP gateway."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.servers import ServerProcess
from tests.support.service import Service
from tests.support.web import NODE_FOLDER, Web


@pytest.fixture(scope="session")
def web_service() -> Iterator[Service]:
    """A server that all tests share, with a store in memory and an HTTP gateway."""
    with ServerProcess("--http", "127.0.0.1:0") as process:
        service = Service(process.address, process)
        yield service
        service.close()


@pytest.fixture(scope="session")
def web(web_service: Service) -> Web:
    assert web_service.process is not None
    return Web(web_service.process.http)


@pytest.fixture
def serve_web(serve: Callable[..., Service]) -> Callable[..., tuple[Service, Web]]:
    """Start a server of this test's own, with an HTTP gateway."""

    def start(*flags: str, **settings: Any) -> tuple[Service, Web]:
        service = serve("--http", "127.0.0.1:0", *flags, **settings)
        assert service.process is not None
        return service, Web(service.process.http)

    return start


@pytest.fixture(scope="session")
def node_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of tests/web/node with the packages of npm."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed: make node")
    folder = tmp_path_factory.mktemp("web") / "node"
    shutil.copytree(NODE_FOLDER, folder, ignore=shutil.ignore_patterns("node_modules"))
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    subprocess.run(command, cwd=folder, check=True, timeout=120)
    return folder
