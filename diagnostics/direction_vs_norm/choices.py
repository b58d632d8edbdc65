"""What may be asked: sets of pairs."""

PAIR_SETS = ("random", "same_norm", "high_cosine", "scale_rotate")
