"""The limits of requests, in one table; `validation` checks them. Sizes are UTF-8 bytes unless named otherwise."""

from __future__ import annotations

from datetime import timedelta

MAX_ID_BYTES = 128
MAX_NAME_BYTES = 256
MAX_REASON_BYTES = 4096
MAX_ERROR_MESSAGE_BYTES = 4096
MAX_ERROR_REASON_BYTES = 128
MAX_LABELS = 64
MAX_LABEL_KEY_BYTES = 63
MAX_LABEL_VALUE_BYTES = 256
MAX_RESULT_BYTES = 64 * 1024
"""As a serialised google.protobuf.Struct."""
MAX_RESULT_DEPTH = 32
MAX_REQUEST_ID_BYTES = 64
MAX_INT32 = 2**31 - 1

MAX_BATCH_UPDATES = 500
MAX_MASK_PATHS = 100
MAX_PAGE_SIZE = 1000
MAX_FILTER_IDS = 1000
MAX_FILTER_NAMES = 100
MAX_FILTER_STATES = 100
MAX_REQUEST_BYTES = 4 * 1024 * 1024
"""The default limit of gRPC servers for a message."""
MAX_RESPONSE_BYTES = 1024 * 1024
"""A quarter of what gRPC clients accept by default: pages and batch replies end here, one job later at the latest."""

MIN_HEARTBEAT_TIMEOUT = timedelta(seconds=1)
MAX_HEARTBEAT_TIMEOUT = timedelta(days=7)
MIN_HEARTBEAT_INTERVAL = timedelta(seconds=1)
MAX_WATCH_INTERVAL = timedelta(days=1)

MAX_REQUEST_AGE = timedelta(hours=24)
"""The age, by the time in it, from which an unknown request_id is refused: it may be a repeat that is forgotten."""
TRANSITIONS_KEPT = 1000
"""Entries of a job's history; older ones are trimmed."""
CLOCK_TOLERANCE = timedelta(minutes=1)
"""A job whose end is further in the future than this ended while the clock was wrong. Adjustments are far smaller."""

CANCELLED_CODE = 1
UNKNOWN_CODE = 2
DEADLINE_EXCEEDED_CODE = 4
MAX_ERROR_CODE = 16
"""The last of google.rpc.Code; above it, those that this package uses by name."""
