"""The parts of paper_claims.py: what is measured, and what follows from it."""
