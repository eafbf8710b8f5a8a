ALTER TABLE requests ADD COLUMN target_low DOUBLE;
ALTER TABLE requests ADD COLUMN target_high DOUBLE;
ALTER TABLE requests ADD COLUMN target_source VARCHAR;
COMMENT ON COLUMN requests.target_low IS 'Lower end of the range that the target is known to (nats per token).';
COMMENT ON COLUMN requests.target_high IS 'Upper end of that range.';
COMMENT ON COLUMN requests.target_source IS 'asked, undo (1.4 times the way that undoing the optimizer''s steps by applied goes, whatever the direction), or held-out (the members'' losses carried onto those of held-out samples).';

ALTER TABLE requests ADD COLUMN max_retained_increase DOUBLE;
COMMENT ON COLUMN requests.max_retained_increase IS 'Limit on the rise of the loss of any one sample that stays (nats per token); NULL: none.';
COMMENT ON COLUMN scores.role IS 'forget, retained (drawn at random), neighbour (of those that stay, whom the update was about to hit most) or holdout.';

ALTER TABLE paths ADD COLUMN worst_rise DOUBLE;
COMMENT ON COLUMN paths.worst_rise IS 'Largest rise of the loss of one sample that stays.';
ALTER TABLE paths ADD COLUMN forecast_loss DOUBLE;
COMMENT ON COLUMN paths.forecast_loss IS 'Mean loss of the samples to forget as expected from the start of the path, to second order; NULL where the model has no forward derivative.';

ALTER TABLE scores ADD COLUMN forecast DOUBLE;
ALTER TABLE scores ADD COLUMN target DOUBLE;
COMMENT ON COLUMN scores.forecast IS 'Value expected from the overlap of the sample''s gradient with the update, and its curvature along it.';
COMMENT ON COLUMN scores.target IS 'Loss estimated for the sample if it had never been trained on; NULL unless it was to be forgotten.';

CREATE TABLE token_losses (
    request_id INTEGER NOT NULL,
    sample_id BIGINT NOT NULL,
    position INTEGER NOT NULL,
    before FLOAT NOT NULL,
    after FLOAT,
    first_met FLOAT
);
COMMENT ON TABLE token_losses IS 'Where the loss of the forgotten rose, token by token: compare after − before with first_met − before, what training on them had taken away.';
COMMENT ON COLUMN token_losses.request_id IS 'Which request.';
COMMENT ON COLUMN token_losses.sample_id IS 'Which sample.';
COMMENT ON COLUMN token_losses.position IS 'Place of the predicted token in the sample, from 1 (the first token, 0, is not predicted).';
COMMENT ON COLUMN token_losses.before IS 'Loss with the checkpoint before (nats).';
COMMENT ON COLUMN token_losses.after IS 'Loss with the checkpoint after; NULL if none was written.';
COMMENT ON COLUMN token_losses.first_met IS 'Loss when training first met the sample, from its stored gradient (half precision: up to 7.6 nats); NULL where its output side was not stored.';

CREATE OR REPLACE VIEW forgotten AS
SELECT q.request_id, s.id, q.verdict, q.direction, q.dose, x.before AS loss_before,
       x.after AS loss_after, coalesce(x.target, q.target) AS target,
       (x.after - x.before) / nullif(coalesce(x.target, q.target) - x.before, 0) AS way,
       q.created_at, q.model_out, s.sample_id
FROM requests q
JOIN scores x ON x.request_id = q.request_id AND x.role = 'forget' AND x.metric = 'loss'
JOIN samples s USING (sample_id);
COMMENT ON VIEW forgotten IS 'One row per request and sample that was to be forgotten, with its loss before and after, the loss estimated for it if never trained on, and how much of the way there it went (applied at its own dose goes 0.71 of it, as the estimate is made by it).';

CREATE VIEW ledger AS
SELECT x.request_id, s.id, x.role, x.before AS loss_before, x.after AS loss_after,
       x.after - x.before AS rise, x.forecast - x.before AS forecast_rise, s.sample_id
FROM scores x
JOIN samples s USING (sample_id)
WHERE x.metric = 'loss' AND x.role <> 'forget' AND x.after IS NOT NULL
ORDER BY x.request_id, rise DESC;
COMMENT ON VIEW ledger IS 'Who was hit: what a request did to each sample that stays and was measured, the worst first, with the rise that the overlap of gradients had foretold.';
