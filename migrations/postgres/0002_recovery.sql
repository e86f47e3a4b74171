-- What a run did to be answered although the upstream refused its request, and what the model used.

ALTER TABLE runs
    -- The recovery of a refused run: the upstream thread on trial, and what its history leaves out.
    ADD COLUMN recovery jsonb,
    -- What a run without a message of its own found of the last messages, which it answers again.
    ADD COLUMN rerun    text;

ALTER TABLE threads
    -- The last refusal that a run recovered from, and with what history the upstream answered.
    ADD COLUMN last_refusal        jsonb,
    -- Tokens of all runs.
    ADD COLUMN input_tokens        bigint NOT NULL DEFAULT 0,
    ADD COLUMN cached_input_tokens bigint NOT NULL DEFAULT 0,
    ADD COLUMN output_tokens       bigint NOT NULL DEFAULT 0,
    ADD COLUMN reasoning_tokens    bigint NOT NULL DEFAULT 0,
    -- Tokens of the newest run with a usage, input and output: about what the model has to read next time.
    ADD COLUMN context_tokens      bigint NOT NULL DEFAULT 0;

INSERT INTO schema_versions (version, compatible_since) VALUES (2, 1);
