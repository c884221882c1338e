-- What such an application does. Every commit drives the plugins; the rollback drives nothing.
INSERT INTO users (name, email, password) VALUES ('Ada', 'ada@example.org', 'secret'), ('Bob', 'bob@example.org', 'secret');

BEGIN;
SELECT set_config('tidegate.user_id', '1', true), set_config('tidegate.user_name', 'Ada', true);
INSERT INTO orders (customer, total) SELECT id, 10 * id FROM users;
UPDATE orders SET state = 'paid' WHERE customer = 1;
COMMIT;

BEGIN;
DELETE FROM orders;
ROLLBACK;

-- Changes nothing that is told.
UPDATE users SET password = 'another secret';

-- Takes the orders of Bob with him.
DELETE FROM users WHERE name = 'Bob';
