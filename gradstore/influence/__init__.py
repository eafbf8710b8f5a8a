"""Stored gradients to scores: which records shaped what a model says."""
