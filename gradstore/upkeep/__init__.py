"""What is done to a store as a whole: verified, repaired, compacted, erased from, recovered."""
