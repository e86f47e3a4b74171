-- What stands for names where they must not be read: in logs, at upstreams, in receipts.

-- The key of the HMAC that makes fingerprints, one for the database. The first process that starts makes it.
CREATE TABLE fingerprint_key (
    id     smallint PRIMARY KEY CHECK (id = 1),
    secret bytea    NOT NULL CHECK (length(secret) = 32)
);

-- The fingerprint of the user whose threads are deleted: by it a finished receipt, which names nobody, is still shown to that
-- user alone. NULL: an earlier version recorded the request.
ALTER TABLE deletions ADD COLUMN user_fingerprint text COLLATE "C";
