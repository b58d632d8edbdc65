"""How often simulations are repeated: a few times in the daily tests, many times by `make simulate`.

Seeds are fixed, so each of the two passes always or never.
"""

import os

import numpy as np
import pytest

MANY = int(os.environ.get("MECHDIAG_SIMULATIONS", "1"))
"""times as many replications as daily"""
simulation = pytest.mark.simulation


def agrees(share: float, low: float, high: float, n: int) -> bool:
    """Whether a share of n replications lies between low and high, or at most 3 binomial standard errors outside."""
    error = [3 * np.sqrt(p * (1 - p) / n) for p in (low, high)]
    return low - error[0] <= share <= high + error[1]
