CREATE TABLE audit (
    number INTEGER NOT NULL,
    created_at TIMESTAMP NOT NULL,
    kind VARCHAR NOT NULL,
    subject VARCHAR NOT NULL,
    details JSON NOT NULL,
    previous VARCHAR,
    digest VARCHAR NOT NULL
);
COMMENT ON TABLE audit IS 'What was done to models and to this store, without personal data; each entry names the one before, so that none can be changed or taken out unnoticed (`gradstore audit`).';
COMMENT ON COLUMN audit.number IS 'From 1, without gaps.';
COMMENT ON COLUMN audit.created_at IS 'When it was done (UTC).';
COMMENT ON COLUMN audit.kind IS 'forget, receipt, erase, search (after erasing), override (of an erasure) or repair.';
COMMENT ON COLUMN audit.subject IS 'Whom it concerns: hashes of ids as receipts have them, or request:<number>; spaces between.';
COMMENT ON COLUMN audit.details IS 'What was done, in figures; of a receipt its digest.';
COMMENT ON COLUMN audit.previous IS 'Digest of the entry before; NULL for the first.';
COMMENT ON COLUMN audit.digest IS 'SHA-256 of this entry''s canonical JSON (sorted keys, no spaces) with all columns but this one.';

CREATE TABLE erasures (
    id_hash VARCHAR NOT NULL,
    tokens_hash VARCHAR,
    sample_id BIGINT,
    asked_at TIMESTAMP NOT NULL,
    allowed_at TIMESTAMP
);
COMMENT ON TABLE erasures IS 'What was erased from this store, by hashes alone: it is refused if it comes again.';
COMMENT ON COLUMN erasures.id_hash IS 'SHA-256 of the store''s own identity and the id, as in receipts.';
COMMENT ON COLUMN erasures.tokens_hash IS 'The same of its token ids; NULL where none were stored.';
COMMENT ON COLUMN erasures.sample_id IS 'Number of the sample while it is being erased; NULL when it is gone.';
COMMENT ON COLUMN erasures.asked_at IS 'When erasing it began (UTC).';
COMMENT ON COLUMN erasures.allowed_at IS 'When taking it in again was allowed; NULL: it is refused.';

ALTER TABLE receipts ALTER COLUMN update_digest DROP NOT NULL;
COMMENT ON COLUMN receipts.update_digest IS 'SHA-256 of the stored update; NULL where it was erased with a record that it names.';

ALTER TABLE segments ADD COLUMN replaces VARCHAR[];
COMMENT ON COLUMN segments.replaces IS 'Paths of older segments whose contents it has taken over; what is left of them on disk is garbage.';
COMMENT ON COLUMN segments.kind IS 'gradients, moments (optimizer state), holdout, order (of the training data), layers (which a run keeps), or empty (nothing of what it replaces was kept).';
