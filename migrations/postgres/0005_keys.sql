-- API keys. The key itself is not here: it is random enough that its SHA-256 tells nothing of it.
CREATE TABLE api_keys (
    id         uuid        PRIMARY KEY,
    -- The beginning of the key, by which it is found in lists and configurations.
    prefix     text        COLLATE "C" NOT NULL UNIQUE,
    hash       bytea       NOT NULL UNIQUE CHECK (length(hash) = 32),
    tenant     text        COLLATE "C" NOT NULL,
    access     text        NOT NULL CHECK (access IN ('read', 'chat', 'admin', 'operator')),
    label      text        NOT NULL,
    created_at timestamptz NOT NULL,
    revoked_at timestamptz
);
