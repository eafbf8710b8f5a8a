"""The evidence as a page that a person reads."""
