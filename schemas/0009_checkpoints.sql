CREATE TABLE checkpoints (
    run_id INTEGER NOT NULL,
    step BIGINT NOT NULL,
    path VARCHAR NOT NULL,
    digest VARCHAR NOT NULL
);
COMMENT ON TABLE checkpoints IS 'One row per checkpoint that a run saved on its way: an exact replay goes on from the last before a record was met.';
COMMENT ON COLUMN checkpoints.run_id IS 'Which run.';
COMMENT ON COLUMN checkpoints.step IS 'Optimizer steps taken by then.';
COMMENT ON COLUMN checkpoints.path IS 'Folder with weights, optimizer, schedule and random state.';
COMMENT ON COLUMN checkpoints.digest IS 'SHA-256 over the names and digests of its files.';
