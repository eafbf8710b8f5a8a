"""Numbered SQL migrations of the catalog, applied in order, each in one transaction."""
