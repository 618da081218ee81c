"""Client certificates, which TLS has verified. Imported only with [[certificates]] in the auth file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from cryptography import x509
from cryptography.x509.oid import NameOID

from jobstatus_grpc.auth.identity import Credentials, Identity, Role, UnknownIdentityError
from jobstatus_grpc.auth.patterns import to_pattern
from jobstatus_grpc.auth.stanzas import MAX_PRINCIPAL_BYTES, read_only, read_role, read_tenant
from jobstatus_grpc.auth.tokens import bearer_of
from jobstatus_grpc.errors import BadIdentityError, IdentityExpiredError
from jobstatus_grpc.job import JobFilter
from jobstatus_grpc.toml_file import Value

KINDS = ("uri", "dns", "cn")
"""Where a name is: a SAN of this kind, or the common name of the subject."""

_DNS_CHARACTERS = "A-Za-z0-9._-"
"""Of a DNS name in ASCII: regardless of case in Unicode, the Kelvin sign is a k. No `*`: a wildcard names no host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateRule:
    """A stanza of the file."""

    kind: str
    pattern: re.Pattern[str]
    name: str | None
    """The principal. None: the name in the certificate."""
    tenant: str
    role: Role
    only: JobFilter | None


class CertificateAuthenticator:
    """Knows callers by the certificate of their connection. A token, if the call has one, is what counts instead."""

    reads_certificate = True

    def __init__(self, rules: Sequence[CertificateRule]) -> None:
        """Take them in the order in which they are tried."""
        self._rules = rules
        self.given_names = frozenset(rule.name for rule in rules if rule.name is not None)

    async def authenticate(self, credentials: Credentials) -> Identity | None:
        if credentials.certificate is None or bearer_of(credentials) is not None:
            return None
        try:
            certificate = x509.load_pem_x509_certificate(credentials.certificate)
            names = _names_of(certificate)
            expires_at = certificate.not_valid_after_utc
        except Exception:  # cryptography raises many kinds for what TLS may let pass
            raise BadIdentityError("the names in the client certificate cannot be read; make a new one") from None
        if expires_at <= datetime.now(timezone.utc):  # a connection outlasts the certificate that opened it
            raise IdentityExpiredError("the client certificate has expired; renew it, and connect again")
        for rule in self._rules:
            for name in names[rule.kind]:
                if rule.pattern.fullmatch(name):
                    return Identity(
                        rule.name or name,
                        tenant=rule.tenant,
                        role=rule.role,
                        only=rule.only,
                        expires_at=expires_at,
                    )
        listed = ", ".join([f"{kind} {name}" for kind in KINDS for name in names[kind]]) or "none"
        raise UnknownIdentityError(
            f"the client certificate is valid, but its names ({listed[:200]}) are not admitted here, and the call has "
            "no token"
        )


def _names_of(certificate: x509.Certificate) -> Mapping[str, Sequence[str]]:
    """Return the names that can be a principal, by their kind."""
    try:
        alternative = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        alternative = x509.SubjectAlternativeName([])
    common = [str(each.value) for each in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    names = {
        "uri": alternative.get_values_for_type(x509.UniformResourceIdentifier),
        "dns": [name.lower() for name in alternative.get_values_for_type(x509.DNSName) if _is_dns_name(name)],
        "cn": common[:1] if len(common) == 1 else [],  # of several, it is not clear which one the CA has checked
    }
    return {kind: [name for name in found if _is_principal(name)] for kind, found in names.items()}


def _is_dns_name(name: str) -> bool:
    return re.fullmatch(f"[{_DNS_CHARACTERS}]+", name) is not None


def _is_principal(name: str) -> bool:
    return name.isprintable() and 0 < len(name.encode()) <= MAX_PRINCIPAL_BYTES


def read_certificates(section: Value) -> list[CertificateAuthenticator]:
    """Read the stanzas `[[certificates]]`."""
    rules: list[CertificateRule] = []
    for stanza in section.stanzas(("role",), (*KINDS, "name", "tenant", "only")):
        rule = _read_rule(stanza)
        if any((rule.kind, rule.pattern) == (other.kind, other.pattern) for other in rules):
            stanza[rule.kind].refuse("another stanza has the same name")
        rules.append(rule)
    return [CertificateAuthenticator(rules)]


def _read_rule(stanza: Mapping[str, Value]) -> CertificateRule:
    kinds = [kind for kind in KINDS if kind in stanza]
    if len(kinds) != 1:
        stanza["role"].refuse("a stanza of [[certificates]] has one of uri, dns and cn")
    (kind,) = kinds
    value = stanza[kind]
    text = value.text()
    if kind == "uri":
        scheme, found, rest = text.partition("://")
        if not found or "*" in scheme + rest.partition("/")[0]:
            value.refuse('must be a URI such as "spiffe://acme.example/ns/*/sa/worker", with * only in its path')
    if kind == "dns":
        if re.fullmatch(f"[*{_DNS_CHARACTERS}]+", text) is None:
            value.refuse("must be a DNS name of letters, digits, - . _ and *; of an international one, its xn-- form")
        text = text.lower()
    separators = {"uri": "/?#", "dns": ".", "cn": "./"}[kind]
    return CertificateRule(
        kind=kind,
        pattern=to_pattern(text, separators=separators),
        name=stanza["name"].text(max_bytes=MAX_PRINCIPAL_BYTES) if "name" in stanza else None,
        tenant=read_tenant(stanza),
        role=read_role(stanza["role"]),
        only=read_only(stanza),
    )
