-- As migrations/postgres/0002_recovery.sql, which explains the columns.
ALTER TABLE runs ADD COLUMN recovery TEXT;
ALTER TABLE runs ADD COLUMN rerun TEXT;
ALTER TABLE threads ADD COLUMN last_refusal TEXT;
ALTER TABLE threads ADD COLUMN input_tokens INTEGER NOT NULL DEFAULT 0;
ALTER TABLE threads ADD COLUMN cached_input_tokens INTEGER NOT NULL DEFAULT 0;
ALTER TABLE threads ADD COLUMN output_tokens INTEGER NOT NULL DEFAULT 0;
ALTER TABLE threads ADD COLUMN reasoning_tokens INTEGER NOT NULL DEFAULT 0;
ALTER TABLE threads ADD COLUMN context_tokens INTEGER NOT NULL DEFAULT 0;
INSERT INTO schema_versions (version, compatible_since) VALUES (2, 1);
