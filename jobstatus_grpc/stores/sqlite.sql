-- The schema of the SQLite store: one section per version, each run in one transaction on the one before it. A section
-- that was released is never changed. Instants and durations are whole microseconds, instants since 1970 in UTC; texts
-- of several values are JSON. No index holds a column that every update changes: it would halve the rate of updates.

-- version 1

CREATE TABLE store (
    only_row INTEGER PRIMARY KEY CHECK (only_row = 1),
    incarnation TEXT NOT NULL,
    -- Changes up to this number may be gone from `changes`.
    forgotten_sequence INTEGER NOT NULL DEFAULT 0,
    -- Rises when the store tries whether the disk takes writes again.
    probes INTEGER NOT NULL DEFAULT 0
);

INSERT INTO store (only_row, incarnation) VALUES (1, lower(hex(randomblob(8))));

-- `key` rises in the order of creation. The large columns stand last: reading the others does not touch them. The
-- defaults are for upserts that name few columns, always of a row that is there. Both columns of requests hold
-- {request_id: payload_hash}, one a line, the oldest first.
CREATE TABLE jobs (
    key INTEGER PRIMARY KEY,
    tenant TEXT NOT NULL,
    id TEXT NOT NULL,
    name TEXT NOT NULL DEFAULT '',
    state INTEGER NOT NULL DEFAULT 0,
    attempt INTEGER NOT NULL DEFAULT 0,
    revision INTEGER NOT NULL,
    has_progress INTEGER NOT NULL DEFAULT 0,
    progress REAL,
    cancel_requested INTEGER NOT NULL DEFAULT 0,
    stalled INTEGER NOT NULL DEFAULT 0,
    created_at INTEGER NOT NULL DEFAULT 0,
    updated_at INTEGER NOT NULL,
    started_at INTEGER,
    finished_at INTEGER,
    expires_at INTEGER,
    estimated_completion INTEGER,
    heartbeat_timeout INTEGER,
    parent_id TEXT NOT NULL DEFAULT '',
    reason TEXT NOT NULL DEFAULT '',
    error TEXT,
    labels TEXT,
    creation_request TEXT,
    requests TEXT,
    result TEXT,
    UNIQUE (tenant, id)
);

-- One row per job and commit that changed it; the job itself tells its newest state.
CREATE TABLE changes (
    sequence INTEGER PRIMARY KEY,
    tenant TEXT NOT NULL,
    id TEXT NOT NULL,
    revision INTEGER NOT NULL,
    removed INTEGER NOT NULL
);

CREATE TABLE transitions (
    tenant TEXT NOT NULL,
    id TEXT NOT NULL,
    revision INTEGER NOT NULL,
    from_state INTEGER,
    to_state INTEGER NOT NULL,
    reason TEXT NOT NULL,
    transitioned_at INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    actor TEXT NOT NULL,
    PRIMARY KEY (tenant, id, revision)
) WITHOUT ROWID;

CREATE TABLE tombstones (
    tenant TEXT NOT NULL,
    id TEXT NOT NULL,
    revision INTEGER NOT NULL,
    removed_at INTEGER NOT NULL,
    PRIMARY KEY (tenant, id)
) WITHOUT ROWID;
