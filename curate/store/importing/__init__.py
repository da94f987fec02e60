"""Measurements taken elsewhere: `curate import STORE FILE --map ours=theirs …`."""
