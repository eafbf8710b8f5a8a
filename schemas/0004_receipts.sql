CREATE TABLE receipts (
    request_id INTEGER NOT NULL,
    digest VARCHAR NOT NULL,
    update_digest VARCHAR NOT NULL
);
COMMENT ON TABLE receipts IS 'One row per receipt: what its files in receipts/ must still be.';
COMMENT ON COLUMN receipts.request_id IS 'The request it is of; its files are receipts/<request_id>.*, in four digits.';
COMMENT ON COLUMN receipts.digest IS 'SHA-256 of its canonical JSON (sorted keys, no spaces); the next receipt names it too.';
COMMENT ON COLUMN receipts.update_digest IS 'SHA-256 of the stored update.';
