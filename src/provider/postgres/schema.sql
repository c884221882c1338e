-- The tables of one tidegate. Run with the schema as search_path, in the transaction that records the version.
-- Instants are microseconds since the Unix epoch, by the server's clock.

-- One row: the counters of the log. Its lock is what gives out seq in commit order.
CREATE TABLE head (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    head bigint NOT NULL DEFAULT 0,     -- the highest seq given out
    pruned bigint NOT NULL DEFAULT 0,   -- the highest seq that was pruned
    total bigint NOT NULL DEFAULT 0,    -- events kept
    epoch text NOT NULL DEFAULT gen_random_uuid()::text
) WITH (fillfactor = 10, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000,
        autovacuum_vacuum_cost_delay = 0);
INSERT INTO head DEFAULT VALUES;

-- What triggers and applications leave in transactions of their own. Emptied by the broker.
CREATE TABLE inbox (
    position bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    id text,                            -- NULL: a new one is made
    type text NOT NULL,
    source smallint NOT NULL DEFAULT 0, -- as in events
    created_at bigint,                  -- NULL: when it is moved into the log
    key text,
    user_id text,                       -- JSON: a number or a string
    session_id text,
    instance_id text,                   -- NULL: database
    schema text,
    entity text,
    operation text,
    trace_parent text,
    caused_by text,
    metadata text,                      -- a JSON object
    content_type text,                  -- NULL: application/json
    payload text,                       -- JSON, unless content_type says otherwise
    "binary" bytea                      -- what is no text
) WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_cost_delay = 1);

-- What was published. Never changed, but for an erased event: all but seq, id and created_at become NULL.
CREATE TABLE events (
    seq bigint PRIMARY KEY,
    created_at bigint NOT NULL,
    appended_at bigint,
    depth integer NOT NULL DEFAULT 0,
    source smallint,                    -- 0 database, 1 websocket, 2 frontend, 3 system, 4 internal
    id text COLLATE "C" NOT NULL,
    type text COLLATE "C",
    key text,
    user_id text,                       -- JSON: a number or a string
    session_id text,
    instance_id text,
    schema text,
    entity text,
    operation text,
    trace_parent text,
    caused_by text,
    metadata text,                      -- a JSON object; NULL for an empty one
    content_type text,                  -- NULL for application/json
    payload bytea
) WITH (autovacuum_vacuum_insert_scale_factor = 0.05, autovacuum_vacuum_scale_factor = 0.05,
        autovacuum_analyze_scale_factor = 0.05);
CREATE UNIQUE INDEX events_by_id ON events (id);
CREATE INDEX events_by_type ON events (type, seq) WHERE type IS NOT NULL;
CREATE INDEX events_by_age ON events (created_at, seq);

-- Names of subscriptions, as small numbers. They stay for ever.
CREATE TABLE subscriptions (
    id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text COLLATE "C" NOT NULL UNIQUE
);

-- stage: 0 ready, 1 waiting for due, 2 leased, 3 completed, 4 failed.
CREATE TABLE deliveries (
    seq bigint NOT NULL,
    due bigint NOT NULL,
    token bigint,
    lease_end bigint,
    claimed_at bigint,
    started_at bigint,
    completed_at bigint,
    subscription integer NOT NULL,
    retry_count integer NOT NULL DEFAULT 0,
    tries integer NOT NULL DEFAULT 0,
    infra integer NOT NULL DEFAULT 0,
    number integer NOT NULL DEFAULT 0,      -- of the last attempt recorded
    stage smallint NOT NULL DEFAULT 0,
    alone boolean NOT NULL,                 -- whether the event never had another delivery: then progress has no row
    fresh boolean NOT NULL DEFAULT false,   -- whether started_at comes from the present claim
    replay boolean NOT NULL DEFAULT false,
    worker text,
    key text COLLATE "C",
    PRIMARY KEY (seq, subscription)
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 2000,
        autovacuum_vacuum_cost_delay = 0, autovacuum_analyze_scale_factor = 0.05);
CREATE INDEX deliveries_ready ON deliveries (subscription, seq) WHERE stage = 0;
CREATE INDEX deliveries_waiting ON deliveries (subscription, due) WHERE stage = 1;
CREATE INDEX deliveries_leased ON deliveries (subscription, lease_end) WHERE stage = 2;
CREATE INDEX deliveries_failed ON deliveries (seq) WHERE stage = 4;
CREATE INDEX deliveries_keyed ON deliveries (subscription, key, seq) WHERE key IS NOT NULL AND stage < 3;

-- How far events with several deliveries have come.
CREATE TABLE progress (
    seq bigint PRIMARY KEY,
    open integer NOT NULL,
    begun integer NOT NULL DEFAULT 0,
    failed integer NOT NULL DEFAULT 0
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 2000,
        autovacuum_vacuum_cost_delay = 0);
CREATE INDEX progress_open ON progress (seq) WHERE open > 0;
CREATE INDEX progress_failed ON progress (seq) WHERE open = 0 AND failed > 0;

CREATE TABLE attempts (
    seq bigint NOT NULL,
    subscription integer NOT NULL,
    number integer NOT NULL,
    verdict smallint,                   -- of what made a dead letter, and so is digest
    digest text,
    record text NOT NULL,               -- JSON
    PRIMARY KEY (seq, subscription, number)
) WITH (autovacuum_vacuum_insert_scale_factor = 0.05, autovacuum_vacuum_scale_factor = 0.05);

-- Names are bytes: they may be any text, and are listed in the order of their bytes.
CREATE TABLE documents (
    collection bytea NOT NULL,
    key bytea NOT NULL,
    value bytea NOT NULL,
    revision bigint NOT NULL,
    expires bigint,
    PRIMARY KEY (collection, key)
) WITH (fillfactor = 70);
CREATE INDEX documents_by_expiry ON documents (expires) WHERE expires IS NOT NULL;
CREATE SEQUENCE revisions AS bigint;
