CREATE TABLE calibrations (
    run_id INTEGER NOT NULL,
    direction VARCHAR NOT NULL,
    measured_at TIMESTAMP NOT NULL,
    samples INTEGER NOT NULL,
    seed BIGINT NOT NULL,
    dose DOUBLE NOT NULL,
    left_at_dose DOUBLE NOT NULL,
    left_at_default DOUBLE NOT NULL,
    least_share DOUBLE NOT NULL,
    share DOUBLE NOT NULL,
    most_share DOUBLE NOT NULL
);
COMMENT ON TABLE calibrations IS 'How forgetting does on records of a run that one training without them tells: `gradstore calibrate`. The newest of a run and direction sets dose and target of its requests.';
COMMENT ON COLUMN calibrations.run_id IS 'Which run.';
COMMENT ON COLUMN calibrations.direction IS 'As in requests.';
COMMENT ON COLUMN calibrations.measured_at IS 'When (UTC).';
COMMENT ON COLUMN calibrations.samples IS 'Records left out together and forgotten one at a time.';
COMMENT ON COLUMN calibrations.seed IS 'Drew them.';
COMMENT ON COLUMN calibrations.dose IS 'Dose that ends nearest to the retrained model, in multiples of the default: the least median over records.';
COMMENT ON COLUMN calibrations.left_at_dose IS 'Divergence from the retrained model at that dose ÷ that of the original, on the record (0: retrained, 1: nothing done), median.';
COMMENT ON COLUMN calibrations.left_at_default IS 'The same at the default dose.';
COMMENT ON COLUMN calibrations.share IS 'Way of a record''s loss to the retrained model''s ÷ its way at the default dose, median.';
COMMENT ON COLUMN calibrations.least_share IS 'The least of it over records.';
COMMENT ON COLUMN calibrations.most_share IS 'The most.';
