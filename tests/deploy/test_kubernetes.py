"""deploy/kubernetes: what kustomize makes of it is valid, keeps the restricted profile, and starts a server."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import ChainMap
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobstatus_grpc.auth.chain import readers
from jobstatus_grpc.server.config import ServerConfig
from jobstatus_grpc.toml_file import read_toml
from tests.support.certificates import Authority
from tests.support.servers import ServerProcess

FOLDER = Path(__file__).parents[2] / "deploy/kubernetes"
OVERLAYS = ("sqlite", "postgres")
ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"


@pytest.fixture(scope="module")
def render(program, tmp_path_factory):
    """Render an overlay; with `monitored`, with the component for Prometheus."""
    kubectl = program("kubectl")

    def render(overlay: str, *, monitored: bool = True) -> list[dict[str, Any]]:
        folder = shutil.copytree(FOLDER, tmp_path_factory.mktemp("rendered") / "kubernetes")
        file = folder / "overlays" / overlay / "kustomization.yaml"
        if monitored:
            file.write_text(file.read_text().replace("[../../base]", "[../../base, ../../monitoring]"))
        done = subprocess.run([kubectl, "kustomize", file.parent], capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return list(yaml.safe_load_all(done.stdout))

    return render


@pytest.fixture(scope="module", params=OVERLAYS)
def resources(request, render):
    """The resources of each overlay, by kind and name."""
    return {(each["kind"], each["metadata"]["name"]): each for each in render(request.param)}


@pytest.fixture
def pod(resources):
    (found,) = [each for (kind, _), each in resources.items() if kind in ("Deployment", "StatefulSet")]
    return found["spec"]["template"]["spec"]


@pytest.fixture
def container(pod):
    (only,) = pod["containers"]
    return only


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_resources_are_valid(render, program, tmp_path, overlay):
    file = tmp_path / "rendered.yaml"
    file.write_text(yaml.safe_dump_all(render(overlay, monitored=False)))
    done = subprocess.run([program("kubernetes-validate"), "--strict", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_pod_keeps_the_restricted_profile(pod, container):
    context = ChainMap(container["securityContext"], pod["securityContext"])
    assert context["runAsNonRoot"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["readOnlyRootFilesystem"] is True
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert context["capabilities"] == {"drop": ["ALL"]}
    kinds = {kind for volume in pod["volumes"] for kind in volume} - {"name"}
    assert kinds <= {"configMap", "emptyDir", "secret"}  # of those that the profile allows


def test_the_grace_period_is_longer_than_the_drain(pod, container):
    sleep_seconds = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    drain_seconds = ServerConfig().drain_grace.total_seconds()
    assert pod["terminationGracePeriodSeconds"] >= sleep_seconds + drain_seconds + 15


def test_every_selector_finds_the_pods_and_every_port_exists(resources, container):
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    labels = {"app.kubernetes.io/name": "jobstatus"}
    services = [each for (kind, _), each in resources.items() if kind == "Service"]
    assert {port["targetPort"] for service in services for port in service["spec"]["ports"]} <= ports.keys()
    assert [service["spec"]["selector"] for service in services] == [labels] * 2
    assert resources["PodDisruptionBudget", "jobstatus"]["spec"]["selector"] == {"matchLabels": labels}
    monitor, service = resources["ServiceMonitor", "jobstatus"]["spec"], resources["Service", "jobstatus"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}
    assert {container[kind]["grpc"]["port"] for kind in ("startupProbe", "readinessProbe", "livenessProbe")} == {
        ports["health"]
    }


def test_every_file_of_the_server_is_in_a_volume(pod, container):
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    settings = [*container["args"], *(each["value"].replace("sqlite:///", "") for each in container["env"])]
    files = [path for setting in settings for path in re.findall(r"(?:^|=)(/.*)/", setting)]
    assert len(files) == 5
    assert set(files) <= mounts.keys()
    assert {mounts[path] for path in files} <= {volume["name"] for volume in pod["volumes"]} | {"store"}


def test_the_document_makes_every_secret(root, pod):
    text = (root / "docs/deployment.md").read_text()
    names = {volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume}
    assert names <= set(re.findall(r"create secret \w+ (\S+)", text))


def test_its_arguments_start_a_server_for_the_service_accounts_of_its_file(resources, container, tmp_path):
    """On free ports, with certificates and the pod's token in a folder of the test."""
    text = resources["ConfigMap", "jobstatus-auth"]["data"]["auth.toml"]
    authority = Authority()
    pair = authority.issue()
    for path, data in {
        "etc/jobstatus/auth/auth.toml": text.replace(ACCOUNT, f"{tmp_path}{ACCOUNT}").encode(),
        "etc/jobstatus/tls/tls.crt": pair.cert,
        "etc/jobstatus/tls/tls.key": pair.key,
        "etc/jobstatus/metrics/token": b"secret-of-scrapes",
        f"{ACCOUNT}/ca.crt"[1:]: authority.pem,
        f"{ACCOUNT}/token"[1:]: b"token",
    }.items():
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    arguments = [re.sub(r"0\.0\.0\.0:\d+", "127.0.0.1:0", each) for each in container["args"]]
    flags = [each.replace("=/", f"={tmp_path}/") for each in arguments]
    assert flags.pop(0) == "serve"
    assert read_toml(str(tmp_path / "etc/jobstatus/auth/auth.toml"), readers())
    with ServerProcess(*flags, "--transport", "grpcio") as server:
        assert server.terminate() == 0
