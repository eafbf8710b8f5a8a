CREATE TABLE influence_runs (
    influence_id INTEGER NOT NULL,
    created_at TIMESTAMP NOT NULL,
    run_id INTEGER NOT NULL,
    method VARCHAR NOT NULL,
    query VARCHAR NOT NULL,
    settings JSON NOT NULL,
    model_digest VARCHAR
);
COMMENT ON TABLE influence_runs IS 'One row per question which records shaped an output (`gradstore top`).';
COMMENT ON COLUMN influence_runs.influence_id IS 'Number of the question.';
COMMENT ON COLUMN influence_runs.created_at IS 'When it was asked (UTC).';
COMMENT ON COLUMN influence_runs.run_id IS 'Run whose gradients were scored.';
COMMENT ON COLUMN influence_runs.method IS 'dot (nats of the query''s summed loss that the record''s steps took off, to first order), cosine (mean over its gradients), self (the same as dot with the record itself as query), or, with something else in the place of the query''s gradient, hvp (bent by the Gauss-Newton matrix), newton (by stored gradients) or activation (its hidden states).';
COMMENT ON COLUMN influence_runs.query IS 'What was asked about: id:<id>, or text:, completion: or output: with a digest of its tokens; all for self.';
COMMENT ON COLUMN influence_runs.settings IS 'Epochs, sides, whether the query was divided by Adam''s root of second moments; for hvp and newton the damping of the curvature and the relative residual of the solution.';
COMMENT ON COLUMN influence_runs.model_digest IS 'SHA-256 over the weight files of the checkpoint the query''s gradient was taken at; NULL for stored gradients.';

CREATE TABLE influences (
    influence_id INTEGER NOT NULL,
    sample_id BIGINT NOT NULL,
    score DOUBLE NOT NULL,
    rank INTEGER NOT NULL
);
COMMENT ON TABLE influences IS 'Answers: the score of every record that was scored; of more than 100,000 only those that were shown.';
COMMENT ON COLUMN influences.influence_id IS 'Which question.';
COMMENT ON COLUMN influences.sample_id IS 'The record that was scored.';
COMMENT ON COLUMN influences.score IS 'Its score; positive: the record''s steps lowered the query''s loss.';
COMMENT ON COLUMN influences.rank IS 'From 1, the highest score.';

CREATE VIEW influential AS
SELECT i.influence_id, i.rank, s.id, i.score, r.method, r.query, r.created_at, i.sample_id, r.run_id
FROM influences i
JOIN influence_runs r USING (influence_id)
JOIN samples s USING (sample_id);
COMMENT ON VIEW influential IS 'One row per question and record that was scored, with the record''s own id.';
