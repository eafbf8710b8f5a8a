CREATE TABLE matches (
    run_id INTEGER NOT NULL,
    sample_id BIGINT NOT NULL,
    of_sample_id BIGINT NOT NULL,
    jaccard DOUBLE NOT NULL,
    edit DOUBLE NOT NULL,
    cosine DOUBLE,
    measures VARCHAR[] NOT NULL,
    jaccard_from DOUBLE NOT NULL,
    edit_from DOUBLE NOT NULL,
    cosine_from DOUBLE NOT NULL,
    created_at TIMESTAMP NOT NULL
);
COMMENT ON TABLE matches IS 'One row per search and near-duplicate that it found.';
COMMENT ON COLUMN matches.run_id IS 'Run whose records and gradients were compared.';
COMMENT ON COLUMN matches.sample_id IS 'The near-duplicate, a training sample.';
COMMENT ON COLUMN matches.of_sample_id IS 'The sample that was asked about.';
COMMENT ON COLUMN matches.jaccard IS 'Resemblance of their shingles (pairs of tokens, boilerplate left out), 0 to 1.';
COMMENT ON COLUMN matches.edit IS 'Share of both in their longest common subsequence of tokens, 0 to 1.';
COMMENT ON COLUMN matches.cosine IS 'Cosine of their first gradients in Adam''s inner product; NULL if the one asked about was held out.';
COMMENT ON COLUMN matches.measures IS 'Which of jaccard, edit and cosine reached their thresholds.';
COMMENT ON COLUMN matches.jaccard_from IS 'Threshold of jaccard.';
COMMENT ON COLUMN matches.edit_from IS 'Threshold of edit.';
COMMENT ON COLUMN matches.cosine_from IS 'Threshold of cosine.';
COMMENT ON COLUMN matches.created_at IS 'When they were searched for (UTC).';

CREATE VIEW duplicates AS
SELECT s.id, o.id AS duplicate_of, m.jaccard, m.edit, m.cosine, m.measures, m.created_at,
       m.sample_id, m.of_sample_id, m.run_id
FROM matches m
JOIN samples s ON s.sample_id = m.sample_id
JOIN samples o ON o.sample_id = m.of_sample_id
QUALIFY row_number() OVER (
    PARTITION BY m.run_id, m.sample_id, m.of_sample_id ORDER BY m.created_at DESC) = 1;
COMMENT ON VIEW duplicates IS 'One row per run and pair of near-duplicates, as last found, with the samples'' own ids.';
