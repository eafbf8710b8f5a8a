"""Records and a model in, a trained checkpoint and a filled store out."""
