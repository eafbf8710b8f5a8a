"""The parts of forgetting.py: what is trained and forgotten, what it is held against, tables."""
