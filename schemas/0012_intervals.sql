ALTER TABLE measurements ADD COLUMN samples INTEGER;
ALTER TABLE measurements ADD COLUMN original_low DOUBLE;
ALTER TABLE measurements ADD COLUMN original_high DOUBLE;
ALTER TABLE measurements ADD COLUMN model_low DOUBLE;
ALTER TABLE measurements ADD COLUMN model_high DOUBLE;
ALTER TABLE measurements ADD COLUMN reference_low DOUBLE;
ALTER TABLE measurements ADD COLUMN reference_high DOUBLE;
COMMENT ON TABLE measurements IS 'What an evaluation measured: a sample''s metrics, and figures of all samples of a role with their intervals.';
COMMENT ON COLUMN measurements.sample_id IS 'Which sample; NULL for a figure of all samples of the role. Evaluations before schema 12 have no such row where a mean over samples gives it.';
COMMENT ON COLUMN measurements.role IS 'forget, neighbour (of those that stay, whose gradients overlap most with those of the forgotten), retained (drawn at random), holdout, or general (windows of a general text); figures of membership set forget against holdout.';
COMMENT ON COLUMN measurements.samples IS 'How many samples or windows a figure is of; NULL for the row of one sample.';
COMMENT ON COLUMN measurements.original_low IS 'Lower end of the 95 % bootstrap interval of original (of relearned_loss: the least over seeds); NULL for the row of one sample, and where nothing varies.';
COMMENT ON COLUMN measurements.original_high IS 'Upper end of it (of relearned_loss: the most over seeds).';
COMMENT ON COLUMN measurements.model_low IS 'Lower end of the interval of model.';
COMMENT ON COLUMN measurements.model_high IS 'Upper end of it.';
COMMENT ON COLUMN measurements.reference_low IS 'Lower end of the interval of reference.';
COMMENT ON COLUMN measurements.reference_high IS 'Upper end of it.';

CREATE OR REPLACE VIEW evidence AS
SELECT e.evaluation_id, e.request_id, s.id, m.role, m.metric, m.original, m.model, m.reference,
       e.passed, e.created_at, e.model AS checkpoint, m.sample_id, m.samples,
       m.original_low, m.original_high, m.model_low, m.model_high,
       m.reference_low, m.reference_high
FROM measurements m
JOIN evaluations e USING (evaluation_id)
LEFT JOIN samples s USING (sample_id);
COMMENT ON VIEW evidence IS 'One row per measurement of an evaluation: of a sample, with its own id, or (id NULL) a figure of many with the ends of its interval.';
