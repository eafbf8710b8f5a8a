CREATE TABLE evaluations (
    evaluation_id INTEGER NOT NULL,
    request_id INTEGER,
    run_id INTEGER NOT NULL,
    created_at TIMESTAMP NOT NULL,
    model VARCHAR NOT NULL,
    model_digest VARCHAR NOT NULL,
    original VARCHAR,
    original_digest VARCHAR,
    reference VARCHAR,
    reference_digest VARCHAR,
    passed BOOLEAN,
    settings JSON
);
COMMENT ON TABLE evaluations IS 'One row per evaluation of a checkpoint after forgetting.';
COMMENT ON COLUMN evaluations.evaluation_id IS 'Number of the evaluation.';
COMMENT ON COLUMN evaluations.request_id IS 'The last request that was named; NULL where ids alone were.';
COMMENT ON COLUMN evaluations.run_id IS 'Run whose retained and held-out samples were measured.';
COMMENT ON COLUMN evaluations.created_at IS 'When it was made (UTC).';
COMMENT ON COLUMN evaluations.model IS 'The checkpoint in question.';
COMMENT ON COLUMN evaluations.model_digest IS 'SHA-256 over its weight files.';
COMMENT ON COLUMN evaluations.original IS 'Checkpoint before forgetting; NULL if none was given.';
COMMENT ON COLUMN evaluations.original_digest IS 'SHA-256 over its weight files.';
COMMENT ON COLUMN evaluations.reference IS 'Checkpoint that never saw the forgotten; NULL if none was given.';
COMMENT ON COLUMN evaluations.reference_digest IS 'SHA-256 over its weight files.';
COMMENT ON COLUMN evaluations.passed IS 'Whether every check against the reference passed; NULL without one.';
COMMENT ON COLUMN evaluations.settings IS 'Seed and attacks, the checks and what was said, without ids.';

CREATE TABLE measurements (
    evaluation_id INTEGER NOT NULL,
    sample_id BIGINT,
    role VARCHAR NOT NULL,
    metric VARCHAR NOT NULL,
    original DOUBLE,
    model DOUBLE,
    reference DOUBLE
);
COMMENT ON TABLE measurements IS 'What an evaluation measured: a sample''s metrics, and figures of many samples.';
COMMENT ON COLUMN measurements.evaluation_id IS 'Which evaluation.';
COMMENT ON COLUMN measurements.sample_id IS 'Which sample; NULL for a figure of all samples of the role.';
COMMENT ON COLUMN measurements.role IS 'forget, retained or holdout; figures of membership set forget against holdout.';
COMMENT ON COLUMN measurements.metric IS 'loss, probability, min_k, auc_loss, ...: `gradstore eval` prints them.';
COMMENT ON COLUMN measurements.original IS 'Value with the checkpoint before forgetting.';
COMMENT ON COLUMN measurements.model IS 'Value with the checkpoint in question.';
COMMENT ON COLUMN measurements.reference IS 'Value with the checkpoint that never saw the forgotten.';

CREATE VIEW evidence AS
SELECT e.evaluation_id, e.request_id, s.id, m.role, m.metric, m.original, m.model, m.reference,
       e.passed, e.created_at, e.model AS checkpoint, m.sample_id
FROM measurements m
JOIN evaluations e USING (evaluation_id)
LEFT JOIN samples s USING (sample_id);
COMMENT ON VIEW evidence IS 'One row per measurement of an evaluation, with the sample''s own id (NULL for a figure of many).';
