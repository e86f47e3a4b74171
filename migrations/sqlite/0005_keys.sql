-- API keys. `migrations/postgres` holds the same numbers and names, and the reasons.
CREATE TABLE api_keys (
    id         BLOB    PRIMARY KEY,
    prefix     TEXT    NOT NULL UNIQUE,
    hash       BLOB    NOT NULL UNIQUE CHECK (length(hash) = 32),
    tenant     TEXT    NOT NULL,
    access     TEXT    NOT NULL CHECK (access IN ('read', 'chat', 'admin', 'operator')),
    label      TEXT    NOT NULL,
    created_at INTEGER NOT NULL,
    revoked_at INTEGER
) WITHOUT ROWID;
