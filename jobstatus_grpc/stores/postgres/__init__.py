"""Jobs in a PostgreSQL database that any number of server processes share."""

from jobstatus_grpc.stores.postgres.store import IS_SHARED, migrate, open_store

__all__ = ["IS_SHARED", "migrate", "open_store"]
