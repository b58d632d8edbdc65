"""What is asked by default: coefficients of steering."""

COEFFICIENTS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
