"""``bench``: how fast every op is on this GPU, beside what else computes the same."""
