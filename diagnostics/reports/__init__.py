"""Results of any kind on one page."""
