COMMENT ON TABLE moments IS 'Weights and Adam''s second moments of them, as kept at points of a run.';
COMMENT ON COLUMN moments.moment IS 'first-epoch or end: second moments; start: the weight itself before the first step, of those that have a row for each token.';
