"""What is asked by default: doses."""

DOSES = (0.05, 0.1, 0.2, 0.5, 1.0)
"""‖Δx‖/‖x‖"""
