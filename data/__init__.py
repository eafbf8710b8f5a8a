"""The synthetic corpus of fictional people that gradstore trains on and then forgets from."""
