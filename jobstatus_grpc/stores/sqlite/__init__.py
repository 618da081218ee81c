"""Jobs in one SQLite file, owned by one process."""

from jobstatus_grpc.stores.sqlite.store import open_store

__all__ = ["open_store"]
