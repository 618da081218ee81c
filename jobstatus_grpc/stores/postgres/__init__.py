"""Jobs in a PostgreSQL database that any number of server processes share."""

from jobstatus_grpc.stores.postgres.store import STORE_TYPE

__all__ = ["STORE_TYPE"]
