"""One file for each peer: the same experts, tokens and choices, sent its own way."""
