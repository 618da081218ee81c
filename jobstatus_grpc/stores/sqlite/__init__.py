"""Jobs in one SQLite file, owned by one process."""

from jobstatus_grpc.stores.sqlite.store import STORE_TYPE, open_store

__all__ = ["STORE_TYPE", "open_store"]
