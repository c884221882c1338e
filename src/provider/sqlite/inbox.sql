-- Where triggers and applications leave events in transactions of their own. What is NULL is filled in on the way to the
-- log. created_at is in microseconds since the Unix epoch, source as in events, user_id and metadata are JSON. A payload
-- stands in payload as text or in binary.
CREATE TABLE inbox (
    position INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT,
    type TEXT NOT NULL,
    source INTEGER NOT NULL DEFAULT 0,
    created_at INTEGER,
    key TEXT,
    user_id TEXT,
    session_id TEXT,
    instance_id TEXT,
    schema TEXT,
    entity TEXT,
    operation TEXT,
    trace_parent TEXT,
    caused_by TEXT,
    metadata TEXT,
    content_type TEXT,
    payload TEXT,
    binary BLOB
);
