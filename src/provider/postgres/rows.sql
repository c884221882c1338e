-- Where triggers leave several rows of a table as one: how many these are. The payload is then no event's, but
-- {"pk": [names of the key's columns], "rows": [their JSON]}; provider/bundle.rs says what becomes of it.
ALTER TABLE inbox ADD COLUMN rows integer;
