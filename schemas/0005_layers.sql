CREATE TABLE layers (
    run_id INTEGER NOT NULL,
    layer VARCHAR NOT NULL,
    width_in INTEGER NOT NULL,
    width_out INTEGER NOT NULL,
    input_first BOOLEAN NOT NULL,
    bias BOOLEAN NOT NULL
);
COMMENT ON TABLE layers IS 'One row per run and linear layer whose gradients it kept besides those of the embedding.';
COMMENT ON COLUMN layers.run_id IS 'Which run.';
COMMENT ON COLUMN layers.layer IS 'Name of the module; its arrays are <layer>.A (inputs) and <layer>.B (gradient at its outputs).';
COMMENT ON COLUMN layers.width_in IS 'Width of its inputs.';
COMMENT ON COLUMN layers.width_out IS 'Width of its outputs.';
COMMENT ON COLUMN layers.input_first IS 'Whether its weight is (in, out), as in GPT-2, and not (out, in).';
COMMENT ON COLUMN layers.bias IS 'Whether it has a bias.';

COMMENT ON COLUMN segments.kind IS 'gradients, moments (optimizer state), holdout, order (of the training data), or layers (which a run keeps).';
COMMENT ON COLUMN moments.layer IS 'embedding, position, head, or the name of a captured layer''s parameter: also the name of the array.';
