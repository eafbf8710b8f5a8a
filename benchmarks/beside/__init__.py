"""The libraries that benchmarks/peers.py measures, a module each, and what they are measured on."""
