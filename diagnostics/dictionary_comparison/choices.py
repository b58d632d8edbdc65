"""What is asked by default: folds."""

FOLDS = 5
"""Cross-validation folds of the probes; each class needs as many texts, or groups of texts."""
