CREATE TABLE samples (
    sample_id BIGINT NOT NULL,
    id VARCHAR NOT NULL,
    id_hash UBIGINT NOT NULL,
    split VARCHAR NOT NULL,
    tokens INTEGER NOT NULL,
    added_at TIMESTAMP NOT NULL
);
COMMENT ON TABLE samples IS 'One row per training or held-out record. Join everything else on sample_id.';
COMMENT ON COLUMN samples.sample_id IS 'Number given by gradstore; the key of every join.';
COMMENT ON COLUMN samples.id IS 'The id that the user gave the record.';
COMMENT ON COLUMN samples.id_hash IS 'First 64 bits of BLAKE2b(id): finds an id in milliseconds.';
COMMENT ON COLUMN samples.split IS 'train or holdout.';
COMMENT ON COLUMN samples.tokens IS 'Length in tokens.';
COMMENT ON COLUMN samples.added_at IS 'When it entered the catalog (UTC).';

CREATE TABLE runs (
    run_id INTEGER NOT NULL,
    name VARCHAR NOT NULL,
    status VARCHAR NOT NULL,
    started_at TIMESTAMP NOT NULL,
    finished_at TIMESTAMP,
    steps BIGINT,
    epochs_captured VARCHAR NOT NULL,
    sides VARCHAR NOT NULL,
    top_k INTEGER NOT NULL,
    optimizer VARCHAR,
    beta1 DOUBLE,
    beta2 DOUBLE,
    epsilon DOUBLE,
    weight_decay DOUBLE,
    checkpoint VARCHAR,
    checkpoint_digest VARCHAR,
    settings JSON
);
COMMENT ON TABLE runs IS 'One row per training run that was captured.';
COMMENT ON COLUMN runs.run_id IS 'Number of the run.';
COMMENT ON COLUMN runs.name IS 'Name given by the user, or run-<run_id>.';
COMMENT ON COLUMN runs.status IS 'running, finished, or failed (a running one that was killed stays running).';
COMMENT ON COLUMN runs.started_at IS 'Start (UTC).';
COMMENT ON COLUMN runs.finished_at IS 'End (UTC).';
COMMENT ON COLUMN runs.steps IS 'Optimizer steps taken.';
COMMENT ON COLUMN runs.epochs_captured IS 'Which epochs were asked for: first, all, every:N or a list.';
COMMENT ON COLUMN runs.sides IS 'input, or both where the output side of the gradient is stored too.';
COMMENT ON COLUMN runs.top_k IS 'Vocabulary entries kept per position of the output side.';
COMMENT ON COLUMN runs.optimizer IS 'Class of the optimizer.';
COMMENT ON COLUMN runs.beta1 IS 'Adam''s first decay rate.';
COMMENT ON COLUMN runs.beta2 IS 'Adam''s second decay rate.';
COMMENT ON COLUMN runs.epsilon IS 'Adam''s epsilon.';
COMMENT ON COLUMN runs.weight_decay IS 'Weight decay of the captured weights.';
COMMENT ON COLUMN runs.checkpoint IS 'Where the trained model was written.';
COMMENT ON COLUMN runs.checkpoint_digest IS 'SHA-256 over its weight files.';
COMMENT ON COLUMN runs.settings IS 'Everything else the run was started with.';

CREATE TABLE segments (
    segment_id INTEGER NOT NULL,
    path VARCHAR NOT NULL,
    run_id INTEGER NOT NULL,
    kind VARCHAR NOT NULL,
    profile VARCHAR NOT NULL,
    records INTEGER NOT NULL,
    "rows" BIGINT NOT NULL,
    bytes BIGINT NOT NULL,
    digest VARCHAR NOT NULL,
    written_at TIMESTAMP NOT NULL
);
COMMENT ON TABLE segments IS 'One row per immutable folder of Zarr arrays.';
COMMENT ON COLUMN segments.segment_id IS 'Number of the segment.';
COMMENT ON COLUMN segments.path IS 'Folder below the store.';
COMMENT ON COLUMN segments.run_id IS 'The run that wrote it.';
COMMENT ON COLUMN segments.kind IS 'gradients, moments (optimizer state), holdout, or order (of the training data).';
COMMENT ON COLUMN segments.profile IS 'packed (bit shuffle + LZ4), raw (uncompressed) or small (eight bits).';
COMMENT ON COLUMN segments.records IS 'Gradient records in it.';
COMMENT ON COLUMN segments.rows IS 'Token positions in it.';
COMMENT ON COLUMN segments.bytes IS 'Bytes on disk, all files.';
COMMENT ON COLUMN segments.digest IS 'SHA-256 of its manifest, which holds the digest of every file.';
COMMENT ON COLUMN segments.written_at IS 'When it was written (UTC).';

CREATE TABLE exposures (
    run_id INTEGER NOT NULL,
    sample_id BIGINT NOT NULL,
    epoch INTEGER NOT NULL,
    step BIGINT NOT NULL,
    learning_rate DOUBLE NOT NULL,
    batch_share DOUBLE NOT NULL,
    grad_scale DOUBLE NOT NULL,
    loss FLOAT,
    scored_tokens INTEGER NOT NULL,
    d_norm FLOAT NOT NULL,
    h_norm FLOAT,
    mass_kept FLOAT,
    relative_error FLOAT,
    segment_id INTEGER NOT NULL,
    row_start BIGINT NOT NULL,
    "rows" INTEGER NOT NULL,
    token_start BIGINT NOT NULL,
    tail_row INTEGER,
    position_start INTEGER
);
COMMENT ON TABLE exposures IS 'One row per captured meeting of a run with a sample: what undoing it needs, and where its gradient lies.';
COMMENT ON COLUMN exposures.run_id IS 'Which run.';
COMMENT ON COLUMN exposures.sample_id IS 'Which sample.';
COMMENT ON COLUMN exposures.epoch IS 'Epoch, from 1.';
COMMENT ON COLUMN exposures.step IS 'Optimizer step, from 1.';
COMMENT ON COLUMN exposures.learning_rate IS 'Learning rate of the embedding at that step.';
COMMENT ON COLUMN exposures.batch_share IS 'Factor by which the gradient of the sample''s summed loss entered the batch gradient.';
COMMENT ON COLUMN exposures.grad_scale IS 'Factor between accumulated and applied gradient at that step (clipping; 1 = none).';
COMMENT ON COLUMN exposures.loss IS 'The sample''s loss at that moment: mean nats per scored token.';
COMMENT ON COLUMN exposures.scored_tokens IS 'Tokens that the loss counted.';
COMMENT ON COLUMN exposures.d_norm IS 'Frobenius norm of D, the gradient at the embedding''s output (summed loss).';
COMMENT ON COLUMN exposures.h_norm IS 'Root of the sum over positions of |R|²|H|²: size of the output side, entries kept.';
COMMENT ON COLUMN exposures.mass_kept IS 'Share of the output side''s probability mass in the entries kept (the rest is in the tail).';
COMMENT ON COLUMN exposures.relative_error IS 'Measured |stored − exact| / |exact| of the whole gradient, on a sample of records; else NULL.';
COMMENT ON COLUMN exposures.segment_id IS 'Segment that holds the gradient.';
COMMENT ON COLUMN exposures.row_start IS 'First row of D, H and R in the segment.';
COMMENT ON COLUMN exposures.rows IS 'Rows: the sample''s tokens less the last, which predicts nothing.';
COMMENT ON COLUMN exposures.token_start IS 'First row of tokens in the segment.';
COMMENT ON COLUMN exposures.tail_row IS 'Row of the segment''s tail array, shared by a micro-batch.';
COMMENT ON COLUMN exposures.position_start IS 'Row of the position embedding that the first token met; NULL without one.';

CREATE TABLE moments (
    run_id INTEGER NOT NULL,
    moment VARCHAR NOT NULL,
    step BIGINT NOT NULL,
    layer VARCHAR NOT NULL,
    segment_id INTEGER NOT NULL
);
COMMENT ON TABLE moments IS 'Adam''s second moments of the captured weights, as kept at two points of a run.';
COMMENT ON COLUMN moments.run_id IS 'Which run.';
COMMENT ON COLUMN moments.moment IS 'first-epoch or end.';
COMMENT ON COLUMN moments.step IS 'Optimizer steps that had been taken (for the bias correction).';
COMMENT ON COLUMN moments.layer IS 'embedding, position or head: also the name of the array.';
COMMENT ON COLUMN moments.segment_id IS 'Segment that holds the array.';

CREATE TABLE holdout (
    run_id INTEGER NOT NULL,
    sample_id BIGINT NOT NULL,
    segment_id INTEGER NOT NULL,
    token_start BIGINT NOT NULL,
    tokens INTEGER NOT NULL
);
COMMENT ON TABLE holdout IS 'Where the tokens of held-out samples lie.';
COMMENT ON COLUMN holdout.run_id IS 'Which run they were held out of.';
COMMENT ON COLUMN holdout.sample_id IS 'Which sample.';
COMMENT ON COLUMN holdout.segment_id IS 'Segment that holds its tokens.';
COMMENT ON COLUMN holdout.token_start IS 'First row of tokens in the segment.';
COMMENT ON COLUMN holdout.tokens IS 'Number of tokens.';

CREATE TABLE holdout_losses (
    run_id INTEGER NOT NULL,
    sample_id BIGINT NOT NULL,
    epoch INTEGER NOT NULL,
    step BIGINT NOT NULL,
    loss FLOAT NOT NULL
);
COMMENT ON TABLE holdout_losses IS 'Loss of every held-out sample before training (epoch 0) and after each epoch.';
COMMENT ON COLUMN holdout_losses.run_id IS 'Which run.';
COMMENT ON COLUMN holdout_losses.sample_id IS 'Which held-out sample.';
COMMENT ON COLUMN holdout_losses.epoch IS 'Epochs completed.';
COMMENT ON COLUMN holdout_losses.step IS 'Optimizer steps taken.';
COMMENT ON COLUMN holdout_losses.loss IS 'Mean nats per token.';

CREATE TABLE requests (
    request_id INTEGER NOT NULL,
    run_id INTEGER NOT NULL,
    created_at TIMESTAMP NOT NULL,
    direction VARCHAR NOT NULL,
    dose_asked VARCHAR NOT NULL,
    dose DOUBLE,
    target DOUBLE,
    max_holdout_increase DOUBLE,
    verdict VARCHAR NOT NULL,
    reason VARCHAR NOT NULL,
    model_in VARCHAR NOT NULL,
    model_in_digest VARCHAR NOT NULL,
    model_out VARCHAR,
    model_out_digest VARCHAR,
    seconds DOUBLE NOT NULL,
    settings JSON
);
COMMENT ON TABLE requests IS 'One row per forget request.';
COMMENT ON COLUMN requests.request_id IS 'Number of the request.';
COMMENT ON COLUMN requests.run_id IS 'Run whose gradients were used.';
COMMENT ON COLUMN requests.created_at IS 'When it was made (UTC).';
COMMENT ON COLUMN requests.direction IS 'applied (the optimizer''s steps) or raw (the paper''s sum of first-epoch gradients).';
COMMENT ON COLUMN requests.dose_asked IS 'The --dose given: a number, target, or target:NATS.';
COMMENT ON COLUMN requests.dose IS 'Multiple of the direction that was added; NULL if nothing was, or by a replay.';
COMMENT ON COLUMN requests.target IS 'Mean loss aimed at or checked against (nats per token).';
COMMENT ON COLUMN requests.max_holdout_increase IS 'Limit on the rise of the held-out loss (nats per token).';
COMMENT ON COLUMN requests.verdict IS 'forgotten, partly or refused.';
COMMENT ON COLUMN requests.reason IS 'The verdict in a sentence with its numbers.';
COMMENT ON COLUMN requests.model_in IS 'Checkpoint before.';
COMMENT ON COLUMN requests.model_in_digest IS 'SHA-256 over its weight files.';
COMMENT ON COLUMN requests.model_out IS 'Checkpoint after; NULL if none was written.';
COMMENT ON COLUMN requests.model_out_digest IS 'SHA-256 over its weight files.';
COMMENT ON COLUMN requests.seconds IS 'Wall-clock seconds it took.';
COMMENT ON COLUMN requests.settings IS 'Everything else it was started with.';

CREATE TABLE scores (
    request_id INTEGER NOT NULL,
    sample_id BIGINT NOT NULL,
    role VARCHAR NOT NULL,
    metric VARCHAR NOT NULL,
    before DOUBLE NOT NULL,
    after DOUBLE
);
COMMENT ON TABLE scores IS 'What a request did to each sample that was measured.';
COMMENT ON COLUMN scores.request_id IS 'Which request.';
COMMENT ON COLUMN scores.sample_id IS 'Which sample.';
COMMENT ON COLUMN scores.role IS 'forget, retained or holdout.';
COMMENT ON COLUMN scores.metric IS 'loss (mean nats per token).';
COMMENT ON COLUMN scores.before IS 'Value with the checkpoint before.';
COMMENT ON COLUMN scores.after IS 'Value with the checkpoint after; NULL if none was written.';

CREATE TABLE paths (
    request_id INTEGER NOT NULL,
    dose DOUBLE NOT NULL,
    forget_loss DOUBLE NOT NULL,
    retained_loss DOUBLE,
    holdout_loss DOUBLE,
    chosen BOOLEAN NOT NULL
);
COMMENT ON TABLE paths IS 'The path of a request: mean losses at every dose that was tried.';
COMMENT ON COLUMN paths.request_id IS 'Which request.';
COMMENT ON COLUMN paths.dose IS 'Multiple of the direction.';
COMMENT ON COLUMN paths.forget_loss IS 'Mean loss of the samples to forget (nats per token).';
COMMENT ON COLUMN paths.retained_loss IS 'Mean loss of a sample of those that stay.';
COMMENT ON COLUMN paths.holdout_loss IS 'Mean loss of held-out samples.';
COMMENT ON COLUMN paths.chosen IS 'Whether this dose was written to the new checkpoint.';

CREATE VIEW gradients AS
SELECT s.id, r.name AS run, e.epoch, e.step, e.loss, e.d_norm, e.h_norm, e.relative_error,
       e.learning_rate, e.batch_share, s.tokens, g.path AS segment, e.row_start, e."rows",
       s.sample_id, e.run_id, e.segment_id
FROM exposures e
JOIN samples s USING (sample_id)
JOIN runs r USING (run_id)
JOIN segments g USING (segment_id);
COMMENT ON VIEW gradients IS 'One row per stored gradient, with the sample''s own id, the run''s name and the segment''s path.';

CREATE VIEW forgotten AS
SELECT q.request_id, s.id, q.verdict, q.direction, q.dose, x.before AS loss_before,
       x.after AS loss_after, q.target, q.created_at, q.model_out, s.sample_id
FROM requests q
JOIN scores x ON x.request_id = q.request_id AND x.role = 'forget' AND x.metric = 'loss'
JOIN samples s USING (sample_id);
COMMENT ON VIEW forgotten IS 'One row per request and sample that was to be forgotten, with its loss before and after.';

CREATE VIEW collateral AS
SELECT x.request_id, x.role, x.metric, count(*) AS samples, avg(x.before) AS before,
       avg(x.after) AS after, avg(x.after - x.before) AS change,
       max(x.after - x.before) AS worst_change
FROM scores x
GROUP BY x.request_id, x.role, x.metric;
COMMENT ON VIEW collateral IS 'Mean scores of a request by role: the forgotten, the retained and the held-out.';
