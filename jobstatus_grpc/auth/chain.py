"""All authenticators of an auth file, and the order in which they are asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from jobstatus_grpc.auth.identity import Authenticator, Credentials, Identity, UnknownIdentityError
from jobstatus_grpc.auth.plugins import PluginReader
from jobstatus_grpc.auth.tokens import bearer_of, read_tokens
from jobstatus_grpc.errors import NoIdentityError, PermissionDeniedError
from jobstatus_grpc.toml_file import Reader, Value

SECTIONS = ("tokens", "jwt", "certificates", "authenticators")
"""Of the auth file, each with callers, in the order in which they are asked."""


def readers() -> dict[str, Reader]:
    """Return a new reader for each of SECTIONS, from a Value to a list of authenticators."""
    return {
        "tokens": read_tokens,
        "jwt": _JwtReader(),
        "certificates": _read_certificates,
        "authenticators": PluginReader(),
    }


class Chain:
    """The authenticators of a file; the first that knows the credentials decides."""

    def __init__(self, contents: Mapping[str, Any]) -> None:
        """Take what the readers returned, by section."""
        self._authenticators: list[Authenticator] = [each for name in SECTIONS for each in contents.get(name, ())]
        keys: Iterable[frozenset[str]] = (getattr(each, "metadata_keys", frozenset()) for each in self._authenticators)
        self.metadata_keys = frozenset({"authorization"}).union(*keys)
        """The metadata by which a caller is known."""
        self._given_names: frozenset[str] = frozenset().union(*map(_names_given_by, self._authenticators))
        """The principals that stanzas name."""
        self.reads_certificate = any(getattr(each, "reads_certificate", False) for each in self._authenticators)
        self.reads_peer = any(getattr(each, "reads_peer", False) for each in self._authenticators)
        self.reads_metadata_only = not self.reads_certificate and not self.reads_peer

    async def identify(self, credentials: Credentials) -> tuple[Identity, float]:
        """Return the caller, and for how many seconds at most this may be kept; its expiry may be earlier.

        Raises:
            UnauthenticatedError: the credentials are missing, not valid, or known to no authenticator.
            PermissionDeniedError: they are valid, and give no role, or a name that the file gives to another caller.
            UnavailableError: they cannot be checked now.
        """
        unknown: UnknownIdentityError | None = None
        try:
            if bearer_of(credentials) is not None:
                unknown = UnknownIdentityError(
                    "the token is not known here; check that it is whole, and meant for this server"
                )
        except UnknownIdentityError as error:  # of another scheme, which a plugin may know
            unknown = error
        for each in self._authenticators:
            try:
                caller = await each.authenticate(credentials)
            except UnknownIdentityError as error:
                unknown = error
            else:
                if caller is not None:
                    if caller.principal in self._given_names and caller.principal not in _names_given_by(each):
                        raise _name_is_taken(caller.principal)
                    keep = getattr(each, "seconds_kept", None)
                    return caller, float("inf") if keep is None else keep(caller)
        raise unknown or NoIdentityError(
            "the call carries no credentials; send a token (--token-file, JOBSTATUS_TOKEN, or the metadata "
            "authorization: Bearer TOKEN), or connect with a client certificate that the server admits"
        )


def _names_given_by(authenticator: Authenticator) -> frozenset[str]:
    return getattr(authenticator, "given_names", frozenset())


def _name_is_taken(principal: str) -> PermissionDeniedError:
    # In the history, the log and [limits], the two would be one.
    return PermissionDeniedError(
        f"your credentials are valid, but their name {principal!r} is that of another caller, which a stanza "
        "[[tokens]] or [[certificates]] names; the operator of the server can set principal_prefix in [[jwt]], or "
        "rename the stanza"
    )


class _JwtReader:
    """Reads `[[jwt]]` with the extra `security`."""

    def __init__(self) -> None:
        self._reader: Reader | None = None

    def __call__(self, section: Value) -> Any:
        if self._reader is None:
            try:
                from jobstatus_grpc.auth.jwt import JwtReader
            except ModuleNotFoundError as error:
                _refuse_without_extra(section, error)
            self._reader = JwtReader()
        return self._reader(section)


def _read_certificates(section: Value) -> Any:
    try:
        from jobstatus_grpc.auth.certificates import read_certificates
    except ModuleNotFoundError as error:
        _refuse_without_extra(section, error)
    return read_certificates(section)


def _refuse_without_extra(section: Value, error: ModuleNotFoundError) -> NoReturn:
    if (error.name or "").partition(".")[0] not in ("jwt", "cryptography"):
        raise error
    section.refuse("needs an extra that is not installed; pip install 'jobstatus-grpc[security]'")
