"""From logits to ids: a pure function of (logits, parameters, the row's tokens, seed, position), each row by itself."""
