"""The choices that a specification curve varies."""

import numpy as np

CLAIMS = {
    "direction": "direction matters more than norm",
    "deeper": "and the more so the deeper",
}
COMPARISONS = {
    "patch ÷ patch": (("direction",), ("norm",)),
    "at equal distance": (("placebo_norm",), ("norm",)),
    "over own placebos": (("direction", "placebo_norm"), ("norm", "placebo_direction")),
}
"""What is divided by what. As published: direction patch by norm patch. At equal distance: a random rotation by the norm patch
that moves x as far. Over own placebos: (direction patch ÷ a random edit of its norm and angle) ÷ (norm patch ÷ a random rotation
by its distance)."""
METRICS = {"kl": "KL", "js": "Jensen-Shannon", "top1_changed": "top-1 changed"}
SINKS = {"10 × median": 10.0, "none": np.inf}
DEPTHS = ("early", "middle", "late")
"""Thirds of the blocks; the last block is left out, where the final norm makes every norm patch a no-op."""
FACTORS = {
    "direction": ("text", "context", "sink filter", "metric", "comparison", "depth"),
    "deeper": ("text", "context", "sink filter", "metric", "comparison"),
}
