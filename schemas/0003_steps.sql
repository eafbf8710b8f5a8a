CREATE TABLE steps (
    run_id INTEGER NOT NULL,
    step BIGINT NOT NULL,
    epoch INTEGER NOT NULL,
    learning_rate DOUBLE NOT NULL,
    grad_scale DOUBLE NOT NULL
);
COMMENT ON TABLE steps IS 'One row per optimizer step of a run, captured or not: how much training came after a record was met.';
COMMENT ON COLUMN steps.run_id IS 'Which run.';
COMMENT ON COLUMN steps.step IS 'Optimizer step, from 1.';
COMMENT ON COLUMN steps.epoch IS 'Epoch, from 1.';
COMMENT ON COLUMN steps.learning_rate IS 'Learning rate of the embedding at that step.';
COMMENT ON COLUMN steps.grad_scale IS 'Factor between accumulated and applied gradient at that step (clipping; 1 = none).';

COMMENT ON COLUMN requests.direction IS 'applied (what is left of the optimizer''s steps), newton (the same by the curvature of what stays), raw (first-epoch gradients, the paper''s), fresh or random (to compare with), or exact (trained again).';
