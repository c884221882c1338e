-- The tables of an application that knows nothing of tidegate.
CREATE TABLE users (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL,
    email text NOT NULL UNIQUE,
    password text NOT NULL
);
CREATE TABLE orders (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    customer bigint NOT NULL REFERENCES users ON DELETE CASCADE,
    total numeric(10, 2) NOT NULL,
    state text NOT NULL DEFAULT 'open'
);
