-- How far an event is from one that no handler published.
ALTER TABLE events ADD COLUMN depth INTEGER NOT NULL DEFAULT 0;
