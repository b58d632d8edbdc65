"""The metric of pairs: of edited rows, and of recorded prompts as they stand."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from numpy import ndarray

from diagnostics.pairs.pair import Pairs
from interventions.metrics import LogitDifference, Probability, TokenMetric
from interventions.recording import Recording
from interventions.replaying.replay import unembed

METRICS = ("logit_difference", "probability")
"""At a prompt's last position: logit(right) − logit(wrong), or the probability of the right answer."""


def metric_of(pairs: Pairs, which: Sequence[int] | ndarray | int, metric: str) -> TokenMetric:
    """The metric of rows of these pairs, one a row; of one pair: of any number of rows."""
    right, wrong = (
        x[[which]] if isinstance(which, int) else x[list(which)][:, None] for x in (pairs.right, pairs.wrong)
    )
    return LogitDifference(right, wrong) if metric == "logit_difference" else Probability(right)


def metric_of_run(run: Recording, pairs: Pairs, which: Sequence[int], metric: str) -> Float[ndarray, "pair"]:
    """The metric of recorded prompts, those of the pairs `which` in this order."""
    rows = torch.arange(len(run.length))
    last = run.final_hidden[rows.to(run.final_hidden.device), (run.length - 1).to(run.final_hidden.device)]
    return metric_of(pairs, which, metric)(unembed(run, last), rows).double().cpu().numpy()
