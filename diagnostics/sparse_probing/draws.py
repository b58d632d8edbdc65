"""Many draws of a data set's probes at once, with shuffled labels or other splits; selection and fit anew in each."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from diagnostics.sparse_probing.tasks import Task
from diagnostics.statistics.logistic import many_fits

_ENTRIES, _ENTRIES_GPU = 2**23, 2**26
"""Numbers at once in the features of the probes, draws × texts × latents."""


@torch.no_grad()
def accuracies(
    z: Float[Tensor, "text d_sae"], drawn: Sequence[Sequence[Task]], ks: Sequence[int], inverse_penalty: float
) -> Float[ndarray, "draw k"]:
    """Held-out accuracy of each draw, pooled over its tasks: texts classified rightly ÷ texts held out.

    z: latents averaged over each text's tokens. drawn: the tasks of each draw, as many of each. Each probe reads the k latents of largest
    |mean difference| on the training texts of its own task, as kind `selected`; the probes of one task of all draws are fitted at once.
    """
    z = torch.where(z.isnan(), 0, z).double()  # texts without tokens are in no task
    most = min(max(ks), z.shape[1])
    budget = _ENTRIES if z.device.type == "cpu" else _ENTRIES_GPU
    right, total = torch.zeros(len(drawn), len(ks)).to(z), torch.zeros(len(drawn), 1).to(z)
    for tasks in zip(*drawn, strict=True):
        few = max(1, budget // (most * max(len(task.train) for task in tasks)))
        for start in range(0, len(tasks), few):
            part, some = slice(start, start + few), tasks[start : start + few]
            train, y, there = _padded([task.train for task in some], [task.y_train for task in some], z)
            test, truth, held = _padded([task.test for task in some], [task.y_test for task in some], z)
            own, rest = (side / side.sum(-1, keepdim=True) for side in (there * y, there * (1 - y)))
            contrast = torch.zeros(len(some), len(z)).to(z).scatter_add(1, train, own - rest)
            best = (contrast @ z).abs().topk(most, dim=1).indices[:, None]
            features, shown = z[train[..., None], best], z[test[..., None], best]
            for i, k in enumerate(ks):
                weight, bias = many_fits(features[..., :k], y, there, inverse_penalty)
                logits = (shown[..., :k] @ weight[..., None])[..., 0] + bias[:, None]
                right[part, i] += (held * ((logits > 0) == (truth > 0))).sum(1)
            total[part] += held.sum(1, keepdim=True)
    return (right / total).cpu().numpy()


def _padded(places: list[ndarray], truth: list[ndarray], z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Texts of each draw, 1 for those of the class, and 1 for those that are there: some draws have fewer than others."""
    at, y, there = (np.zeros((len(places), max(map(len, places)))) for _ in range(3))
    for i, (some, own) in enumerate(zip(places, truth, strict=True)):
        at[i, : len(some)], y[i, : len(some)], there[i, : len(some)] = some, own, 1
    return torch.from_numpy(at).to(z.device).long(), torch.from_numpy(y).to(z), torch.from_numpy(there).to(z)
