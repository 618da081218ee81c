-- A file as version 1 of the schema left it: what `.dump` of the sqlite3 shell prints, with the marks that it omits.
PRAGMA application_id = 1248813651;
PRAGMA user_version = 1;
BEGIN TRANSACTION;
CREATE TABLE changes (
    sequence INTEGER PRIMARY KEY,
    tenant TEXT NOT NULL,
    id TEXT NOT NULL,
    revision INTEGER NOT NULL,
    removed INTEGER NOT NULL
);
INSERT INTO "changes" VALUES(1,'default','render',2,0);
INSERT INTO "changes" VALUES(2,'default','backup',2,0);
INSERT INTO "changes" VALUES(3,'default','gone',2,0);
INSERT INTO "changes" VALUES(4,'default','gone',3,1);
INSERT INTO "changes" VALUES(5,'other','render',1,0);
INSERT INTO "changes" VALUES(6,'default','plain',1,0);
INSERT INTO "changes" VALUES(7,'default','failed',2,0);
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
INSERT INTO "jobs" VALUES(1,'default','render','render ☃',2,1,2,1,NULL,0,0,1772366400000250,1772366400000250,1772366400000250,NULL,NULL,NULL,NULL,'parent','',NULL,'{"team":"me\"dia","zone":"eu"}',NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(2,'default','backup','',4,0,2,0,NULL,0,0,1772366401000250,1772366401000250,NULL,1772366401000250,1772971201000250,NULL,NULL,'','',NULL,'{"team":"me\"dia"}',NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(4,'other','render','',1,0,1,0,NULL,0,0,1772366402000250,1772366402000250,NULL,NULL,NULL,NULL,NULL,'','',NULL,'{"zone":"eu"}',NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(5,'default','plain','',1,0,1,0,NULL,0,0,1772366402000250,1772366402000250,NULL,NULL,NULL,NULL,NULL,'','',NULL,'{"wei\"rd\\ ☃":""}',NULL,NULL,NULL);
INSERT INTO "jobs" VALUES(6,'default','failed','render ☃',6,0,2,0,NULL,0,0,1772366402000250,1772366402000250,NULL,1772366402000250,1772971202000250,NULL,NULL,'','','{"code":2,"message":"","reason":""}',NULL,NULL,NULL,NULL);
CREATE TABLE store (
    only_row INTEGER PRIMARY KEY CHECK (only_row = 1),
    incarnation TEXT NOT NULL,
    -- Changes up to this number may be gone from `changes`.
    forgotten_sequence INTEGER NOT NULL DEFAULT 0,
    -- Rises when the store tries whether the disk takes writes again.
    probes INTEGER NOT NULL DEFAULT 0
);
INSERT INTO "store" VALUES(1,'dd930c008807e259',0,0);
CREATE TABLE tombstones (
    tenant TEXT NOT NULL,
    id TEXT NOT NULL,
    revision INTEGER NOT NULL,
    removed_at INTEGER NOT NULL,
    PRIMARY KEY (tenant, id)
) WITHOUT ROWID;
INSERT INTO "tombstones" VALUES('default','gone',3,1772366402000250);
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
INSERT INTO "transitions" VALUES('default','backup',1,NULL,1,'',1772366401000250,0,'');
INSERT INTO "transitions" VALUES('default','backup',2,1,4,'',1772366401000250,0,'');
INSERT INTO "transitions" VALUES('default','failed',1,NULL,1,'',1772366402000250,0,'');
INSERT INTO "transitions" VALUES('default','failed',2,1,6,'',1772366402000250,0,'');
INSERT INTO "transitions" VALUES('default','plain',1,NULL,1,'',1772366402000250,0,'');
INSERT INTO "transitions" VALUES('default','render',1,NULL,1,'',1772366400000250,0,'');
INSERT INTO "transitions" VALUES('default','render',2,1,2,'',1772366400000250,1,'');
INSERT INTO "transitions" VALUES('other','render',1,NULL,1,'',1772366402000250,0,'');
COMMIT;
