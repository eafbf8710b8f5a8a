"""Training to records: hooks that see each sample's gradient fall out of the backward pass."""
