"""Checkpoints to evidence: what a model still knows about a record."""
