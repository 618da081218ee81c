-- The schema of the SQLite store: one section per version. Each section migrates from the version before it, in one
-- transaction. Released statements are never changed, nor the comments inside them, which SQLite stores with a table.
-- Instants are microseconds since 1970 in UTC; durations are microseconds; text columns with several values are JSON.
-- No index contains a column that every update changes: that would halve the rate of updates.

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

-- `key` increases in the order of creation. The large columns are last, so that reading the other columns does not read
-- them. The defaults serve upserts that name few columns, always of an existing row. creation_request and requests
-- contain {request_id: payload_hash}, one per line, oldest first.
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

-- The change feed: one row per job and commit that changed it. The newest state of the job is in `jobs`.
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

-- version 2

-- For lists: each page is read from one of these indexes, in the order of creation.
CREATE INDEX jobs_by_state ON jobs (tenant, state, stalled, created_at);
CREATE INDEX jobs_by_name ON jobs (tenant, name, created_at) WHERE name <> '';
CREATE INDEX jobs_by_parent ON jobs (tenant, parent_id, created_at) WHERE parent_id <> '';

CREATE TABLE labels (
    tenant TEXT NOT NULL,
    name TEXT NOT NULL,
    value TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    job_key INTEGER NOT NULL,
    PRIMARY KEY (tenant, name, value, created_at, job_key)
) WITHOUT ROWID;

INSERT INTO labels (tenant, name, value, created_at, job_key)
SELECT jobs.tenant, label.key, label.value, jobs.created_at, jobs.key FROM jobs, json_each(jobs.labels) AS label;

-- The number of jobs in each state that ever had a job.
CREATE TABLE counts (
    state INTEGER PRIMARY KEY,
    jobs INTEGER NOT NULL
);

INSERT INTO counts (state, jobs) SELECT state, count(*) FROM jobs GROUP BY state;

-- For maintenance: jobs that expire, jobs that can become stalled, and old tombstones.
CREATE INDEX jobs_by_expiry ON jobs (expires_at) WHERE expires_at IS NOT NULL;
CREATE INDEX jobs_by_silence ON jobs (key) WHERE state = 2 AND heartbeat_timeout IS NOT NULL;
CREATE INDEX tombstones_by_age ON tombstones (removed_at);

-- The sequence of the newest change at certain instants, to determine the age of changes.
CREATE TABLE marks (
    marked_at INTEGER PRIMARY KEY,
    sequence INTEGER NOT NULL
);

-- version 3

-- One row per process that made changes: a position names the epoch of its change. A copy of the file that goes another
-- way has other epochs from there on. `store.incarnation` is the name of the first one, and not read any more.
CREATE TABLE epochs (
    first_sequence INTEGER PRIMARY KEY,
    name TEXT NOT NULL
);

INSERT INTO epochs (first_sequence, name) SELECT 0, incarnation FROM store;

-- The random name of the write-ahead log, the name of the log before it, which has been copied into the file as a whole,
-- and PRAGMA schema_version at that time. They show whether a log that is found at opening is the file's own.
ALTER TABLE store ADD COLUMN log TEXT;
ALTER TABLE store ADD COLUMN previous_log TEXT;
ALTER TABLE store ADD COLUMN log_schema INTEGER;

UPDATE store SET log = lower(hex(randomblob(8)));

-- Of a removed job: the job as it ended, as JSON. Its last change may not have been read when it was removed.
ALTER TABLE changes ADD COLUMN final TEXT;

ALTER TABLE jobs ADD COLUMN cancel_reason TEXT NOT NULL DEFAULT '';

-- Under 0: the number of stalled jobs.
INSERT INTO counts (state, jobs) SELECT 0, count(*) FROM jobs WHERE stalled;

-- version 4

ALTER TABLE jobs RENAME COLUMN has_progress TO reports_progress;

-- version 5

ALTER TABLE jobs ADD COLUMN last_heartbeat_at INTEGER;

-- `final` has the names of the columns now, so that later versions can read it.
UPDATE changes SET final = NULL;

-- version 6

ALTER TABLE jobs ADD COLUMN first_progress REAL;
ALTER TABLE jobs ADD COLUMN first_progress_at INTEGER;

-- version 7

-- The requests that the jobs remember; `jobs.requests` has those of before this version. `number` increases with time,
-- `sequence` is that of the newest change before: together with `marks` it is the age. `request` has the bytes of a
-- request_id that is a UUIDv7, which is in the order of time, else a hash. The requests of a removed job stay until they
-- are old.
CREATE TABLE requests (
    number INTEGER PRIMARY KEY,
    sequence INTEGER NOT NULL,
    request BLOB NOT NULL,
    job_key INTEGER NOT NULL,
    payload_hash TEXT NOT NULL,
    UNIQUE (request, job_key)
);

-- The highest key of a job when a job was last removed: no later job gets a key that stored requests name.
ALTER TABLE store ADD COLUMN last_key INTEGER NOT NULL DEFAULT 0;

-- version 8

-- The CRC-32 of the row's other values, see `checksum` in stores/sql/rows.py. It is NULL in the rows of earlier versions,
-- which are not checked: jobs and changes up to the numbers in `store`, and transitions if there were jobs. In any other
-- row NULL is damage, as a record that is cut short ends in NULLs. A later version that changes rows raises the numbers.
ALTER TABLE jobs ADD COLUMN checksum INTEGER;
ALTER TABLE changes ADD COLUMN checksum INTEGER;
ALTER TABLE transitions ADD COLUMN checksum INTEGER;

ALTER TABLE store ADD COLUMN unchecked_key INTEGER NOT NULL DEFAULT 0;
ALTER TABLE store ADD COLUMN unchecked_sequence INTEGER NOT NULL DEFAULT 0;

UPDATE store SET
    unchecked_key = coalesce((SELECT max(key) FROM jobs), 0),
    unchecked_sequence = coalesce((SELECT max(sequence) FROM changes), 0);

-- version 9

-- With the state, a list by name or parent and state reads no jobs to leave most of them out; `key` for the order.
DROP INDEX jobs_by_name;
DROP INDEX jobs_by_parent;
CREATE INDEX jobs_by_name ON jobs (tenant, name, created_at, key, state, stalled) WHERE name <> '';
CREATE INDEX jobs_by_parent ON jobs (tenant, parent_id, created_at, key, state, stalled) WHERE parent_id <> '';

-- version 10

-- The children of jobs in numbers, as JSON: {state: number of children}, and under 0 the sum of their progress in
-- millionths of a percent, where a done one has 100 %. The job itself need not exist. `checksum` is that of the other
-- values, and NULL until the numbers change.
CREATE TABLE children (
    tenant TEXT NOT NULL,
    parent_id TEXT NOT NULL,
    numbers TEXT NOT NULL,
    checksum INTEGER,
    PRIMARY KEY (tenant, parent_id)
) WITHOUT ROWID;

INSERT INTO children (tenant, parent_id, numbers)
SELECT tenant, parent_id, json_group_object(CAST(state AS TEXT), number) FROM (
    SELECT tenant, parent_id, state, count(*) AS number
    FROM jobs WHERE parent_id <> '' GROUP BY tenant, parent_id, state
    UNION ALL
    SELECT tenant, parent_id, 0,
        sum(CASE WHEN state > 3 THEN 100000000 ELSE CAST(min(max(coalesce(progress, 0), 0), 100) * 1000000 AS INTEGER) END)
    FROM jobs WHERE parent_id <> '' GROUP BY tenant, parent_id
) WHERE number > 0 GROUP BY tenant, parent_id;

-- version 11

-- A W3C traceparent; NULL: none.
ALTER TABLE jobs ADD COLUMN trace_parent TEXT;
