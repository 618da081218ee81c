"""What stanzas of the auth file have in common: the tenant, the role and the jobs of the callers that they admit."""

from __future__ import annotations

from collections.abc import Mapping

from jobstatus_grpc.auth.identity import Role
from jobstatus_grpc.job import DEFAULT_TENANT, JobFilter, limits
from jobstatus_grpc.job.validation import Violations, check_id
from jobstatus_grpc.toml_file import Value

ROLES = {role.name.lower(): role for role in Role}
"""By the words of the file and of the command line."""

MAX_PRINCIPAL_BYTES = 256
"""It is in each entry of a job's history."""


def read_role(value: Value) -> Role:
    """Return the role that the text names."""
    return value.choice(ROLES)


def read_tenant(stanza: Mapping[str, Value]) -> str:
    """Return the stanza's `tenant`, or the default one."""
    if "tenant" not in stanza:
        return DEFAULT_TENANT
    tenant = stanza["tenant"].text()
    for violation in tenant_violations(tenant):
        stanza["tenant"].refuse(violation.description)
    return tenant


def tenant_violations(tenant: str) -> Violations:
    """Return what is wrong with a tenant's name, which an admin sends as metadata."""
    violations: Violations = []
    check_id(tenant, "tenant", violations)
    return violations


def read_only(stanza: Mapping[str, Value]) -> JobFilter | None:
    """Return the stanza's `only`: labels that a job must have, and the beginning of its name. None: there is none."""
    if "only" not in stanza:
        return None
    table = stanza["only"].table(optional=("labels", "name_prefix"))
    labels = table["labels"].entries() if "labels" in table else {}
    if not labels and "name_prefix" not in table:
        stanza["only"].refuse('names no labels and no name_prefix; write only = { labels = { team = "core" } }')
    if len(labels) > limits.MAX_LABELS:
        table["labels"].refuse(f"must be at most {limits.MAX_LABELS} labels")
    for key, value in labels.items():
        if not key or len(key.encode()) > limits.MAX_LABEL_KEY_BYTES:
            value.refuse(f"the key of a label has 1 to {limits.MAX_LABEL_KEY_BYTES} bytes")
    return JobFilter(
        labels={key: value.text(max_bytes=limits.MAX_LABEL_VALUE_BYTES) for key, value in labels.items()},
        name_prefix=table["name_prefix"].text(max_bytes=limits.MAX_NAME_BYTES) if "name_prefix" in table else "",
    )
