"""`jobstatus whoami`, and --tenant."""

from __future__ import annotations

import json
import re

from jobstatus.v1 import job_status_pb2 as pb

from tests.support.samples import LIMITED
from tests.support.scripted_server import ScriptedServer, reply

ANSWER = reply(pb.GetCallerIdentityResponse(identity=LIMITED))


def test_a_server_without_authentication_says_so(here):
    rows = here("whoami").stdout
    assert re.search(r"^principal +ipv4:127.0.0.1:\d+ \(not authenticated: .* without --auth\)$", rows, re.MULTILINE)
    assert re.search(r"^tenant +default$", rows, re.MULTILINE)
    assert re.search(r"^role +operator$", rows, re.MULTILINE)


def test_limits_and_expiry_are_printed(run_here):
    with ScriptedServer(GetCallerIdentity=[ANSWER]) as server:
        rows = dict(line.split(maxsplit=1) for line in run_here(server.address)("whoami").stdout.splitlines())
    assert rows == {
        "principal": "ci",
        "tenant": "web",
        "role": "worker",
        "only": "label team=core, name core-*",
        "expires": "1970-01-01T00:01:40Z",
    }


def test_json_has_the_fields_of_the_api(run_here):
    with ScriptedServer(GetCallerIdentity=[ANSWER]) as server:
        identity = json.loads(run_here(server.address)("whoami", "--json").stdout)
    assert (identity["principal"], identity["role"], identity["authenticated"]) == ("ci", "ROLE_WORKER", True)
    assert identity["only"]["labels"] == {"team": "core"}


def test_the_tenant_is_sent_from_the_flag_or_the_variable(run_here):
    with ScriptedServer(GetCallerIdentity=[ANSWER, ANSWER]) as server:
        run_here(server.address)("whoami", "--tenant", "web")
        run_here(server.address)("whoami", env={"JOBSTATUS_TENANT": "core"})
    assert [call["x-jobstatus-tenant"] for call in server.metadata] == ["web", "core"]


def test_a_role_that_may_not_choose_a_tenant_is_refused(here):
    done = here("whoami", "--tenant", "web")
    assert (done.returncode, "the role admin" in done.stderr) == (1, True)


def test_the_command_of_run_works_in_the_same_tenant(here):
    assert here("run", "--tenant", "default", "--", "sh", "-c", "echo $JOBSTATUS_TENANT").stdout == "default\n"
