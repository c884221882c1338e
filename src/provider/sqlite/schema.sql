-- One row: the counters of the log.
CREATE TABLE head (
    only INTEGER PRIMARY KEY CHECK (only = 1),
    head INTEGER NOT NULL,      -- the highest seq given out
    pruned INTEGER NOT NULL,    -- the highest seq that was pruned
    total INTEGER NOT NULL,     -- events kept
    revision INTEGER NOT NULL,  -- the last revision of any document
    epoch TEXT NOT NULL
);

-- What was published. Never changed, but for an erased event: all but seq, id and created_at become NULL.
CREATE TABLE events (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL,
    type TEXT,
    source INTEGER,
    created_at INTEGER NOT NULL,
    appended_at INTEGER,
    key TEXT,
    user_id,
    session_id TEXT,
    instance_id TEXT,
    schema TEXT,
    entity TEXT,
    operation TEXT,
    metadata TEXT,
    trace_parent TEXT,
    caused_by TEXT,
    content_type TEXT,
    payload BLOB
);
CREATE UNIQUE INDEX events_by_id ON events (id);
CREATE INDEX events_by_type ON events (type) WHERE type IS NOT NULL;
CREATE INDEX events_by_age ON events (created_at);

-- Names of subscriptions, as small numbers. They stay for ever.
CREATE TABLE subscriptions (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE
);

-- id is seq << 20 | subscription. Instants are microseconds since the Unix epoch.
-- stage: 0 ready, 1 waiting for due, 2 leased, 3 completed, 4 failed.
CREATE TABLE deliveries (
    id INTEGER PRIMARY KEY,
    subscription INTEGER NOT NULL,
    stage INTEGER NOT NULL DEFAULT 0,
    due INTEGER NOT NULL,
    key TEXT,
    token INTEGER,
    lease_end INTEGER,
    claimed_at INTEGER,
    worker TEXT,
    started_at INTEGER,
    fresh INTEGER NOT NULL DEFAULT 0,   -- whether started_at comes from the present claim
    completed_at INTEGER,
    retry_count INTEGER NOT NULL DEFAULT 0,
    tries INTEGER NOT NULL DEFAULT 0,
    infra INTEGER NOT NULL DEFAULT 0,
    number INTEGER NOT NULL DEFAULT 0,  -- of the last attempt recorded
    replay INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX deliveries_ready ON deliveries (subscription) WHERE stage = 0 AND key IS NULL;
CREATE INDEX deliveries_ready_keyed ON deliveries (subscription) WHERE stage = 0 AND key IS NOT NULL;
CREATE INDEX deliveries_waiting ON deliveries (subscription, due) WHERE stage = 1;
CREATE INDEX deliveries_leased ON deliveries (subscription, lease_end) WHERE stage = 2;
CREATE INDEX deliveries_failed ON deliveries (id >> 20) WHERE stage = 4;
CREATE INDEX deliveries_keyed ON deliveries (subscription, key) WHERE key IS NOT NULL AND stage < 3;

CREATE TABLE attempts (
    delivery INTEGER NOT NULL,
    number INTEGER NOT NULL,
    record TEXT NOT NULL,
    PRIMARY KEY (delivery, number)
) WITHOUT ROWID;

-- Events that are not completed. Small, so that counting them is cheap.
CREATE TABLE progress (
    seq INTEGER PRIMARY KEY,
    open INTEGER NOT NULL,
    begun INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0,
    status INTEGER NOT NULL AS (CASE WHEN open = 0 THEN 3 WHEN begun = 0 THEN 0 ELSE 1 END) VIRTUAL
);

CREATE TABLE documents (
    collection TEXT NOT NULL,
    key TEXT NOT NULL,
    value BLOB NOT NULL,
    revision INTEGER NOT NULL,
    expires INTEGER,
    PRIMARY KEY (collection, key)
) WITHOUT ROWID;
