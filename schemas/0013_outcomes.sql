ALTER TABLE scores ADD COLUMN outcome VARCHAR;
COMMENT ON COLUMN scores.outcome IS 'Of a sample to be forgotten, what came of it: forgotten, partly or refused, by its own range; NULL for others and before schema 13.';

CREATE OR REPLACE VIEW forgotten AS
SELECT q.request_id, s.id, coalesce(x.outcome, q.verdict) AS verdict, q.direction, q.dose,
       x.before AS loss_before, x.after AS loss_after, coalesce(x.target, q.target) AS target,
       (x.after - x.before) / nullif(coalesce(x.target, q.target) - x.before, 0) AS way,
       q.created_at, q.model_out, s.sample_id
FROM requests q
JOIN scores x ON x.request_id = q.request_id AND x.role = 'forget' AND x.metric = 'loss'
JOIN samples s USING (sample_id);
COMMENT ON VIEW forgotten IS 'One row per request and sample that was to be forgotten, with what came of it, its loss before and after, the loss estimated for it if never trained on, and how much of the way there it went (applied at its own dose goes 0.71 of it, as the estimate is made by it).';
