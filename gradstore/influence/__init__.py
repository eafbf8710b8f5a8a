"""Gradients → scores: which records shaped a prediction, and how much."""
