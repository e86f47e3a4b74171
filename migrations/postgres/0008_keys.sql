-- Keys that are `.` or `..`, which were taken before: clients and proxies remove such a segment from a path, even if it is
-- percent-encoded, so that a request about one of them reached another conversation. They are renamed: `renamed:.` and
-- `renamed:..` can be asked for, exported and erased.
UPDATE threads SET
    tenant = CASE WHEN tenant IN ('.', '..') THEN 'renamed:' || tenant ELSE tenant END,
    user_key = CASE WHEN user_key IN ('.', '..') THEN 'renamed:' || user_key ELSE user_key END,
    scope_name = CASE WHEN scope_name IN ('.', '..') THEN 'renamed:' || scope_name ELSE scope_name END
WHERE tenant IN ('.', '..') OR user_key IN ('.', '..') OR scope_name IN ('.', '..');

UPDATE deletions SET
    tenant = CASE WHEN tenant IN ('.', '..') THEN 'renamed:' || tenant ELSE tenant END,
    user_key = CASE WHEN user_key IN ('.', '..') THEN 'renamed:' || user_key ELSE user_key END,
    scope_name = CASE WHEN scope_name IN ('.', '..') THEN 'renamed:' || scope_name ELSE scope_name END
WHERE tenant IN ('.', '..') OR user_key IN ('.', '..') OR scope_name IN ('.', '..');

UPDATE idempotency_keys SET
    tenant = CASE WHEN tenant IN ('.', '..') THEN 'renamed:' || tenant ELSE tenant END,
    user_key = CASE WHEN user_key IN ('.', '..') THEN 'renamed:' || user_key ELSE user_key END,
    scope_name = CASE WHEN scope_name IN ('.', '..') THEN 'renamed:' || scope_name ELSE scope_name END
WHERE tenant IN ('.', '..') OR user_key IN ('.', '..') OR scope_name IN ('.', '..');

UPDATE api_keys SET tenant = 'renamed:' || tenant WHERE tenant IN ('.', '..');
