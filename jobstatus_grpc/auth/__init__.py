"""Which caller a call is from, and what that caller may do. An authenticator of your own imports from here."""

from jobstatus_grpc.auth.identity import Authenticator, Credentials, Identity, Role, UnknownIdentityError

__all__ = ["Authenticator", "Credentials", "Identity", "Role", "UnknownIdentityError"]
