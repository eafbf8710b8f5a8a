"""Stored gradients to a new checkpoint that knows a record less."""
