"""A training file as tokens: made once for a base, in flat arrays, split and compared. Needs no torch."""
