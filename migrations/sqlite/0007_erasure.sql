-- What an erasure must find although it was made, or is still being made, while the request came.
-- `migrations/postgres` holds the same numbers and names, and the reasons.
ALTER TABLE threads ADD COLUMN began_at INTEGER;
ALTER TABLE remnants ADD COLUMN maker BLOB;
