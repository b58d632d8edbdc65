"""Learned exchanges on planted attributes."""

import pytest
import torch

from diagnostics.disentanglement import learning
from diagnostics.disentanglement.learning import learned_mask, learned_subspace
from tests.diagnostics.disentanglement.test_bases import VALUES, answers, planted


def slope_of(x, read, value, base, source, target):
    """∂loss/∂Δx where the logits of attribute a are 4·read_a·x, by autograd on a plain formula."""

    def slope(some, delta):
        with torch.enable_grad():
            put = delta.clone().requires_grad_(True)
            loss = 0
            for a in (0, 1):
                wanted = value[(source if a == target else base)[some], a]
                loss = loss + torch.nn.functional.cross_entropy(
                    4 * (x[base[some]] + put) @ read[a].T, wanted, reduction="sum"
                )
            return torch.autograd.grad(loss, put)[0]

    return slope


@pytest.mark.parametrize("target", [0, 1])
def test_planted_latents_and_subspace_are_learned(target, monkeypatch):
    x, read, value, base, source, _ = planted()
    slope = slope_of(x, read, value, base, source, target)
    z = torch.cat([torch.nn.functional.one_hot(value, VALUES).reshape(len(x), -1).float(), torch.zeros(len(x), 3)], 1)
    moved = z[source] - z[base]
    rows = torch.cat([read.reshape(-1, x.shape[1]), torch.randn(3, x.shape[1])])
    mask = learned_mask(moved, rows, slope, 40, torch.Generator().manual_seed(0))
    assert set(mask.tolist()) == {
        target * VALUES + v for v in range(VALUES)
    }  # no silent latent, none of the other attribute
    monkeypatch.setattr(learning, "DIRECTIONS", 4)
    q = learned_subspace(x[source] - x[base], slope, 200, torch.Generator().manual_seed(1))
    torch.testing.assert_close(q @ q.T, torch.eye(4), atol=1e-5, rtol=0)
    found = answers(x[base] + (x[source] - x[base]) @ q.T @ q, read)
    assert (found[:, target] == value[source, target]).float().mean() > 0.95
    assert (found[:, 1 - target] == value[base, 1 - target]).float().mean() > 0.95
