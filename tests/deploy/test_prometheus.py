"""deploy/prometheus, deploy/grafana and docs/runbook.md: with promtool, Prometheus, and the commands of the runbook."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import os
import re
import subprocess
import time
import urllib.parse
import urllib.request
from collections import Counter
from datetime import timedelta
from pathlib import Path

import asyncpg
import grpc
import pytest
import yaml
from google.protobuf.duration_pb2 import Duration
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client.parser import text_string_to_metric_families

from tests.support.auth import AuthText, bearer
from tests.support.certificates import Authority
from tests.support.postgres import VERSIONS
from tests.support.servers import ServerProcess
from tests.support.service import Service

pytestmark = pytest.mark.slow  # all together

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "deploy/prometheus/alerts.yml"
RUNBOOK = (ROOT / "docs/runbook.md").read_text()
RULES = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
NAMES = {rule["alert"] for rule in RULES}
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = {target["expr"]: panel["title"] for panel in PANELS for target in panel["targets"]}

WAIT_SECONDS = 30
WORDS = {"and", "bool", "by", "group_left", "group_right", "ignoring", "offset", "on", "or", "unless", "without"}
MAX_WATCHERS = 18


def filled(query):
    """The query of a panel, as Grafana sends it for all servers."""
    for name, value in (("$job", ".*"), ("$instance", ".*"), ("$__rate_interval", "10s")):
        query = query.replace(name, value)
    return query


def metrics_in(expression):
    """The names of metrics in an expression: what is no label, value, function or word of the language."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(by|without|ignoring|on) *\([^)]*\)", "", expression)
    return set(re.findall(r"\b[a-zA-Z_:][\w:]*\b(?! *\()", bare)) - WORDS


def until(condition):
    """Return the first result of a condition that is true; it is asked ten times a second."""
    ends_at = time.monotonic() + WAIT_SECONDS
    while not (result := condition()):
        assert time.monotonic() < ends_at
        time.sleep(0.1)
    return result


def secured(folder):
    """The flags of a server with TLS and callers, with their files in a folder, and the token of a caller."""
    authority, auth = Authority(), AuthText(folder / "auth.toml")
    authority.write(folder)
    cert, key = authority.issue(ends=timedelta(hours=5)).write(folder, "server")
    token = auth.admit("robot")
    return ["--auth", str(auth.path), "--tls-cert", cert, "--tls-key", key], token


@contextlib.contextmanager
def calling(server, folder=None, token=None):
    """Yield the service of a server; with the CA in a folder if it has TLS, and with a token if the caller has one."""
    credentials = None if folder is None else grpc.ssl_channel_credentials((folder / "ca.pem").read_bytes())
    service = Service(server.address, server, bearer(token) if token else (), credentials)
    try:
        yield service
    finally:
        service.close()


@contextlib.contextmanager
def metered(*flags, folder, name):
    """Start a server with metrics, and yield it with the address of its metrics."""
    log = folder / f"{name}.log"
    store = f"sqlite:///{folder}/{name}.db"
    flags = ("--metrics", "127.0.0.1:0", "--log-format", "text", *flags)
    with ServerProcess(*flags, store=store, log=log) as server:
        found = until(lambda: re.search(r"metrics on http://([^/]+)/metrics", log.read_text()))
        yield server, found[1]


@contextlib.contextmanager
def prometheus(path, folder, targets):
    """Run Prometheus with the rules made faster, and yield its URL."""
    rules = re.sub(r"^ +for: .*\n", "", ALERTS.read_text(), flags=re.MULTILINE).replace("[5m]", "[10s]")
    (folder / "alerts.yml").write_text(rules)
    static = [{"targets": [address], "labels": {"instance": name}} for name, address in targets.items()]
    config = {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"},
        "rule_files": ["alerts.yml"],
        "scrape_configs": [{"job_name": "jobstatus", "static_configs": static}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = [path, "--config.file=prometheus.yml", "--storage.tsdb.path=data", "--web.listen-address=127.0.0.1:0"]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            said = ""
            for line in process.stderr:
                said += line
                if "Server is ready" in line:
                    break
            listens = re.search(r'"Listening on" address=(\S+)', said)
            assert listens is not None, said
            yield f"http://{listens[1]}"
        finally:
            process.kill()


class Site:
    """Prometheus, and the servers that it scrapes, by the name of their instance."""

    def __init__(self, url, folder, services, stranger):
        self.folder = folder
        self.services = services
        self.stranger = stranger
        """A caller of `bad` without credentials."""
        self._url = url

    def ask(self, path, **parameters):
        with urllib.request.urlopen(f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}") as response:
            return json.load(response)["data"]

    def until_firing(self, alert, instance, severity="critical"):
        """Return an alert once it fires."""
        labels = {"alertname": alert, "severity": severity, **({"instance": instance} if instance else {})}
        return until(
            lambda: [
                each
                for each in self.ask("alerts")["alerts"]
                if each["state"] == "firing" and labels.items() <= each["labels"].items()
            ]
        )[0]


@pytest.fixture(scope="module")
def site(program, free_port, tmp_path_factory):
    """Prometheus with the servers `good`, `full` and `bad`, and none at the address of `down`."""
    path = program("prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    secure, token = secured(folder)
    flags = {"good": [], "full": [], "bad": ["--max-watchers", str(MAX_WATCHERS), *secure]}
    with contextlib.ExitStack() as stack:
        targets = {"down": f"127.0.0.1:{free_port()}"}
        services = {}
        for name in flags:
            server, targets[name] = stack.enter_context(metered(*flags[name], folder=folder, name=name))
            services[name] = stack.enter_context(calling(server, folder, token) if flags[name] else calling(server))
        stranger = stack.enter_context(calling(services["bad"].process, folder))
        yield Site(stack.enter_context(prometheus(path, folder, targets)), folder, services, stranger)


@pytest.fixture(scope="module")
def exposed(tmp_path_factory):
    """The names of all metrics of a server, and `up`, which Prometheus adds."""
    folder = tmp_path_factory.mktemp("exposed")
    flags, _ = secured(folder)
    with (
        metered(*flags, folder=folder, name="exposed") as (_, address),
        urllib.request.urlopen(f"http://{address}/metrics") as response,
    ):
        text = response.read().decode()
    return {"up", *(sample.name for family in text_string_to_metric_families(text) for sample in family.samples)}


@pytest.fixture
def promtool(program):
    path = program("promtool")
    return lambda *arguments: subprocess.run([path, *arguments], capture_output=True, text=True)


def test_promtool_accepts_the_rules(promtool):
    done = promtool("check", "rules", str(ALERTS))
    assert done.returncode == 0, done.stderr


def test_each_alert_fires_where_it_should(promtool):
    done = promtool("test", "rules", str(ALERTS.with_name("alerts_test.yml")))
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_is_tested():
    text = ALERTS.with_name("alerts_test.yml").read_text()
    firing = re.findall(r'labels: ALERTS\{alertname="(\w+)"|alertname: (\w+)\n *eval_time: \w+\n *exp_alerts:', text)
    assert {name for names in firing for name in names if name} == NAMES


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule['alert']}-{rule['labels']['severity']}")
def test_an_alert_names_metrics_that_exist_and_says_what_it_is(rule, exposed):
    assert metrics_in(rule["expr"]) <= exposed
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
    assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{rule['alert'].lower()}"


def test_the_names_of_metrics_are_found_in_an_expression():
    expression = (
        'sum by (le) (rate(a_total{x=~"y|z"}[5m])) / on (x) group_left max(b:c) - time() > 7 * 86400 or absent(d)'
    )
    assert metrics_in(expression) == {"a_total", "b:c", "d"}


def test_a_server_in_order_has_no_alert(site):
    def is_evaluated():
        (group,) = site.ask("rules")["groups"]
        scraped = site.ask("query", query='count_over_time(up{instance="good"}[1m]) > 3')["result"]
        return scraped and all(rule["health"] == "ok" for rule in group["rules"])

    site.services["good"].job_in("SUCCEEDED")
    until(is_evaluated)
    assert [alert for alert in site.ask("alerts")["alerts"] if alert["labels"].get("instance") == "good"] == []


def test_a_server_that_is_down_is_reported(site):
    assert site.until_firing("JobstatusDown", "down")["annotations"]["summary"] == "Prometheus gets no metrics of down"


def test_stalled_jobs_are_reported(site):
    site.services["bad"].job_in("IN_PROGRESS", heartbeat_timeout=Duration(seconds=1))
    alert = site.until_firing("JobstatusJobsStalled", None, "warning")
    assert alert["annotations"]["summary"] == "1 jobs are stalled"


def test_a_certificate_near_its_end_is_reported(site):
    for severity in ("critical", "warning"):
        alert = site.until_firing("JobstatusCertificateExpires", "bad", severity)
        assert re.fullmatch(r"The certificate of bad expires in 4h 5\dm \d+s", alert["annotations"]["summary"])


def test_watches_near_their_limit_are_reported(site):
    service = site.services["bad"]
    job = service.create()
    watches = [service.watch(job.id, timeout=2 * WAIT_SECONDS) for _ in range(MAX_WATCHERS * 8 // 9)]
    for watch in watches:
        next(watch)
    alert = site.until_firing("JobstatusWatchersNearLimit", "bad", "warning")
    for watch in watches:
        watch.cancel()
    assert alert["annotations"]["summary"] == "bad has 88.89% of the watches that it allows"


def test_refused_writes_are_reported(site):
    with pytest.raises(grpc.RpcError):
        site.stranger.create()
    alert = site.until_firing("JobstatusWritesRefused", "bad", "warning")
    assert alert["labels"]["grpc_code"] == "Unauthenticated"


def test_a_store_that_is_gone_is_reported_with_its_errors(site):
    (site.folder / "full.db").rename(site.folder / "away.db")

    def is_refused():
        with contextlib.suppress(grpc.RpcError):
            return not site.services["full"].create()
        return True

    until(is_refused)
    site.until_firing("JobstatusStoreNotWritable", "full")
    site.until_firing("JobstatusErrors", "full")


def test_grafana_has_all_fields_of_the_dashboard():
    register_default_plugins()
    read = json.loads(JSONEncoder().encode(Dashboard.from_json(copy.deepcopy(DASHBOARD))))
    assert lost(DASHBOARD, read) == []


def lost(written, read, path="$"):
    """The paths of what is not, or not the same, in what the model of Grafana has read."""
    if isinstance(written, dict) and isinstance(read, dict):
        pairs = [(f"{path}.{name}", value, read.get(name)) for name, value in written.items()]
    elif isinstance(written, list) and isinstance(read, list) and len(written) == len(read):
        pairs = [(f"{path}[{index}]", *values) for index, values in enumerate(zip(written, read, strict=True))]
    else:
        return [] if written == read else [path]
    return [found for name, before, after in pairs for found in lost(before, after, name)]


def test_panels_have_ids_of_their_own_and_do_not_overlap():
    assert max(Counter(panel["id"] for panel in DASHBOARD["panels"]).values()) == 1
    cells = Counter(
        (x, y)
        for panel in DASHBOARD["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    )
    assert max(cells.values()) == 1
    assert max(x for x, _ in cells) < 24


def test_the_panels_name_metrics_that_exist_of_the_servers_that_are_chosen(exposed):
    for query in QUERIES:
        assert metrics_in(filled(query)) <= exposed, query
        selectors = re.findall(r"\w+\{([^}]*)\}", query)
        assert selectors, query
        assert all(each.startswith('job=~"$job", instance=~"$instance"') for each in selectors), query


def test_promtool_accepts_the_queries_of_the_panels(promtool, tmp_path):
    rules = [{"record": f"query_{number}", "expr": filled(query)} for number, query in enumerate(QUERIES)]
    file = tmp_path / "queries.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    done = promtool("check", "rules", str(file))
    assert done.returncode == 0, done.stderr


def test_each_panel_shows_data_of_a_server(site):
    site.services["bad"].create()
    for query, title in QUERIES.items():
        assert until(lambda query=query: site.ask("query", query=filled(query))["result"]), title


def test_each_alert_has_its_section_in_the_runbook_and_each_section_its_alert():
    sections = re.split(r"^## (.*)\n", RUNBOOK, flags=re.MULTILINE)[1:]
    texts = dict(zip(sections[::2], sections[1::2], strict=True))
    del texts["Before the first alert"]
    assert texts.keys() == NAMES
    for name, text in texts.items():
        parts = re.findall(r"^\*\*(Meaning|Look at|Do not|Do)\b", text, re.MULTILINE)
        assert parts == ["Meaning", "Look at", "Do", "Do not"], name
        assert "```console" in text, name


def test_the_runbook_lists_each_alert_with_its_severity():
    listed = re.findall(r"^\| \[(\w+)\]\(#\w+\) \| ([\w, ]+) \|", RUNBOOK, re.MULTILINE)
    severities = {(name, each) for name, severity in listed for each in severity.split(", ")}
    assert severities == {(rule["alert"], rule["labels"]["severity"]) for rule in RULES}


@pytest.fixture
def operated(program, tmp_path):
    """Run a command of the runbook where a server runs: with a stalled job `video-17`, and calls that were refused."""
    folder = tmp_path
    flags, token = secured(folder)
    (folder / "token").write_text(token)
    with metered(*flags, folder=folder, name="jobs") as (server, metrics), calling(server, folder, token) as service:
        with calling(server, folder) as stranger, pytest.raises(grpc.RpcError):
            stranger.create()
        service.job_in("IN_PROGRESS", id="video-17", heartbeat_timeout=Duration(seconds=1))
        assert any(each.event.job.stalled for each in service.watch("video-17"))
        environment = {
            "PATH": f"{Path(program('jobstatus')).parent}:{os.environ['PATH']}",
            "JOBSTATUS_ADDRESS": server.address,
            "JOBSTATUS_CA": str(folder / "ca.pem"),
            "JOBSTATUS_TOKEN_FILE": str(folder / "token"),
        }
        places = {
            "127.0.0.1:9464": metrics,
            "/var/lib/jobstatus": str(folder),
            "/etc/jobstatus/tls.crt": str(folder / "server.pem"),
        }

        def run(command):
            for place, real in places.items():
                command = command.replace(place, real)
            return subprocess.run(
                ["bash", "-o", "pipefail", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True
            )

        yield run


COMMANDS = [
    line for line in dict.fromkeys(re.findall(r"^\$ (.*)$", RUNBOOK, re.MULTILINE)) if "prometheus-rule" not in line
]
NOTHING_FOUND = [command for command in COMMANDS if "'Internal|Unavailable'" in command]
"""Commands that list errors, of which the server has none."""


def test_the_commands_of_the_runbook_run(operated):
    for command in COMMANDS:
        done = operated(command)
        assert done.stderr == "", command
        assert done.returncode == int(command in NOTHING_FOUND), command
        assert bool(done.stdout) == (command not in NOTHING_FOUND) or "> /dev/null" in command, command


def test_the_rules_become_an_object_of_the_operator(tmp_path):
    (command,) = re.findall(r"^\$ (.*) > prometheus-rule.yaml$", RUNBOOK, re.MULTILINE)
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    made = yaml.safe_load(done.stdout)
    assert (made["kind"], made["spec"]) == ("PrometheusRule", yaml.safe_load(ALERTS.read_text()))


def test_prometheus_takes_the_configuration_of_the_runbook(promtool, tmp_path):
    (block,) = re.findall(r"```yaml\n(.*?)```", RUNBOOK, re.DOTALL)
    for name in ("token", "ca.crt"):
        (tmp_path / name).write_text("")
    (tmp_path / "alerts.yml").write_text(ALERTS.read_text())
    file = tmp_path / "prometheus.yml"
    file.write_text(block.replace("/etc/prometheus/jobstatus", str(tmp_path)))
    done = promtool("check", "config", str(file))
    assert done.returncode == 0, done.stderr
    (begins_with,) = set(re.findall(r'up\{job=~"(.*?)\.\*"\}', ALERTS.read_text()))
    assert yaml.safe_load(block)["scrape_configs"][0]["job_name"].startswith(begins_with)


def test_the_queries_of_the_runbook_run(postgres_shared):
    async def run(url):
        connection = await asyncpg.connect(url)
        try:
            return [await connection.fetch(query) for query in queries]
        finally:
            await connection.close()

    (block,) = re.findall(r"```sql\n(.*?)```", RUNBOOK, re.DOTALL)
    queries = re.findall(r"[^;]+;", block)
    cluster = postgres_shared(next(iter(VERSIONS)))
    settings, sessions = asyncio.run(run(cluster.url("postgres")))
    assert settings[0]["pg_is_in_recovery"] is False
    assert "active" in [session["state"] for session in sessions]
