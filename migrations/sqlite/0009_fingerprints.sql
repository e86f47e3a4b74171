-- What stands for names where they must not be read: in logs, at upstreams, in receipts.
-- `migrations/postgres` holds the same numbers and names, and the reasons.
CREATE TABLE fingerprint_key (
    id     INTEGER PRIMARY KEY CHECK (id = 1),
    secret BLOB    NOT NULL CHECK (length(secret) = 32)
);
ALTER TABLE deletions ADD COLUMN user_fingerprint TEXT;
