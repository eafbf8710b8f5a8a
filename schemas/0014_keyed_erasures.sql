COMMENT ON COLUMN erasures.id_hash IS 'HMAC-SHA256 of the id under the key in erasures.key (hmac-sha256:<hex>); before schema 14 SHA-256 of the store''s own identity and the id.';
COMMENT ON COLUMN audit.subject IS 'Whom it concerns: hashes of ids, as receipts or the table erasures have them, or request:<number>; spaces between.';
