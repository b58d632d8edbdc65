"""Many draws of a data set's probes at once: with its labels shuffled, and with its groups resampled; selection and fit anew in each."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from diagnostics.sparse_probing.tasks import Task
from diagnostics.statistics.logistic import many_fits

_ENTRIES, _ENTRIES_GPU = 2**23, 2**26
"""Numbers in memory at once in the features of the probes, draws × texts × latents."""


@torch.no_grad()
def accuracies(
    z: Float[Tensor, "text d_sae"],
    drawn: Sequence[Sequence[Task]],
    ks: Sequence[int],
    inverse_penalty: float,
    share: Float[ndarray, "draw text"] | None = None,
) -> Float[ndarray, "draw k"]:
    """Held-out accuracy of each draw, pooled over its tasks, with selection and fit anew in each.

        Σ_tasks Σ_held out a·[right] / Σ_tasks Σ_held out a

    z: latents averaged over each text's tokens. drawn: the tasks of each draw (as many of each). share: a, how much each text counts
    in selection, fit and accuracy (None: 1). Each probe reads the k latents of largest |mean difference|, as kind `selected`.
    """
    z = torch.where(z.isnan(), 0, z).double()  # texts without tokens are in no task
    n_draws, most = len(drawn), max(ks)
    a = torch.ones(n_draws, len(z)) if share is None else torch.from_numpy(share)
    a = a.to(z)
    budget = _ENTRIES if z.device.type == "cpu" else _ENTRIES_GPU
    right, total = torch.zeros(n_draws, len(ks)).to(z), torch.zeros(n_draws, 1).to(z)
    for tasks in zip(*drawn, strict=True):
        width = max(len(task.train) for task in tasks) * min(most, z.shape[1])
        for part in torch.arange(n_draws).split(max(1, budget // width)):
            some, own = [tasks[i] for i in part], a[part.to(z.device)]
            train, y = _padded([task.train for task in some], [task.y_train for task in some], z)
            test, truth = _padded([task.test for task in some], [task.y_test for task in some], z)
            b, b_test = (own.gather(1, at.clamp(min=0)) * (at >= 0) for at in (train, test))
            train, test = train.clamp(min=0), test.clamp(min=0)
            side = torch.stack([b * y, b * (1 - y)])
            side = side / side.sum(-1, keepdim=True)
            contrast = torch.zeros(len(some), len(z)).to(z).scatter_add(1, train, side[0] - side[1])
            best = (contrast @ z).abs().topk(min(most, z.shape[1]), dim=1).indices
            features, held = z[train[..., None], best[:, None]], z[test[..., None], best[:, None]]
            for i, k in enumerate(ks):
                weight, bias = many_fits(features[..., :k], y, b, inverse_penalty)
                logits = (held[..., :k] @ weight[..., None])[..., 0] + bias[:, None]
                right[part.to(z.device), i] += (b_test * ((logits > 0) == (truth > 0))).sum(1)
            total[part.to(z.device)] += b_test.sum(1, keepdim=True)
    return (right / total).cpu().numpy()


def _padded(places: list[ndarray], truth: list[ndarray], z: Tensor) -> tuple[Tensor, Tensor]:
    """Texts of each draw, −1 where there are fewer than in another, and whether they are of the class."""
    most = max(map(len, places))
    at, y = np.full((len(places), most), -1), np.zeros((len(places), most))
    for i, (some, own) in enumerate(zip(places, truth, strict=True)):
        at[i, : len(some)], y[i, : len(some)] = some, own
    return torch.from_numpy(at).to(z.device), torch.from_numpy(y).to(z)
