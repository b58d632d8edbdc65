"""Bases, credit and choice on data whose attributes lie in known directions."""

import numpy as np
import pytest
import torch

from diagnostics.disentanglement.bases import (
    Basis,
    at_dose,
    attributed,
    exchanged,
    ordered,
    principal,
    random_of_differing,
    read_subspace,
)

VALUES, D = 3, 12
rng = torch.Generator().manual_seed(0)


def planted() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two attributes of three values each; logit of value v of attribute a is the coordinate of its own direction, turned at random."""
    turn = torch.linalg.qr(torch.randn(D, D, generator=rng)).Q
    read = turn[: 2 * VALUES].reshape(2, VALUES, D)
    value = torch.tensor([[a, b] for a in range(VALUES) for b in range(VALUES)])
    x = read[0, value[:, 0]] + read[1, value[:, 1]] + torch.randn(len(value), 4, generator=rng) @ turn[8:]
    base, source = (torch.tensor(x) for x in zip(*[(i, j) for i in range(9) for j in range(9) if (value[i] != value[j]).all()], strict=True))  # fmt: skip
    gradients = torch.stack([read[a, value[source, a]] - read[a, value[base, a]] for a in (0, 1)])
    return x, read, value, base, source, gradients


def answers(x: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
    return torch.stack([(x @ read[a].T).argmax(1) for a in (0, 1)], 1)


@pytest.mark.parametrize("target", [0, 1])
def test_planted_latents_change_the_target_and_nothing_else(target):
    """Latents are the values: the three of the target come first; exchanging them gives cause 1, isolation 1. All of them: isolation 0."""
    x, read, value, base, source, gradients = planted()
    rows = torch.cat([torch.nn.functional.normalize(torch.randn(5, D, generator=rng)), read.reshape(-1, D)])
    basis = Basis(
        rows,
        torch.cat([torch.zeros(len(x), 5), torch.nn.functional.one_hot(value, VALUES).reshape(len(x), -1).float()], 1),
    )
    order = ordered(attributed(basis, x, gradients, base, source), target)
    assert set(order[:VALUES].tolist()) == {5 + target * VALUES + v for v in range(VALUES)}
    moved = basis.differences(base, source)
    found = answers(x[base] + exchanged(rows, moved, order[:VALUES]), read)
    assert torch.equal(found[:, target], value[source, target]) and torch.equal(
        found[:, 1 - target], value[base, 1 - target]
    )
    assert torch.equal(answers(x[base] + moved @ rows, read), value[source])


@pytest.mark.parametrize("target", [0, 1])
def test_read_subspace_is_orthonormal_and_controls_the_target(target):
    x, read, value, base, source, gradients = planted()
    basis = read_subspace(x, gradients, target)
    rows = basis.directions
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), atol=1e-4, rtol=0)
    torch.testing.assert_close(basis.coefficients, x @ rows.T)
    two = torch.arange(VALUES - 1)  # differences of three values span two directions
    found = answers(x[base] + exchanged(rows, basis.differences(base, source), two), read)
    assert torch.equal(found[:, target], value[source, target]) and torch.equal(
        found[:, 1 - target], value[base, 1 - target]
    )


def test_attributions_sum_to_one_and_match_the_formula():
    x, _, _, base, source, gradients = planted()
    rows = torch.linalg.qr(torch.randn(D, D, generator=rng)).Q
    found = attributed(Basis(rows, x @ rows.T), x, gradients, base, source)
    torch.testing.assert_close(found.sum(1), torch.ones(2))
    g, move, d = gradients.numpy(), (x[source] - x[base]).numpy(), rows.numpy()
    by_hand = np.array([[((ga @ di) * (move @ di)).sum() for di in d] / (ga * move).sum() for ga in g])
    np.testing.assert_allclose(found.numpy(), by_hand, rtol=1e-3, atol=1e-5)
    score = by_hand[1] - np.maximum(by_hand[0], 0)
    assert (np.diff(score[ordered(found, 1).numpy()]) <= 1e-5).all()


def test_principal_components_match_the_covariance():
    x = torch.randn(40, 6, generator=rng, dtype=torch.float64) * torch.tensor([5.0, 3, 2, 1, 0.5, 0.1])
    some = torch.arange(30)
    rows = principal(x, some).directions
    axes = np.linalg.eigh(np.cov(x[:30].numpy().T))[1][:, ::-1].T
    np.testing.assert_allclose(np.abs((rows.numpy() * axes).sum(1)), 1, atol=1e-9)


def test_random_latents_differ_and_match_the_dose():
    moved = torch.randn(7, 20, generator=rng) * (torch.rand(7, 20, generator=rng) < 0.3)
    moved[0] = 0
    drawn = random_of_differing(moved, 20, torch.Generator().manual_seed(1))
    for row, own in zip(moved, drawn, strict=True):
        n = int((row != 0).sum())
        assert set(own[:n].tolist()) == set(row.nonzero()[:, 0].tolist()) and sorted(own.tolist()) == list(range(20))
    rows, like = torch.randn(20, D, generator=rng), torch.randn(7, D, generator=rng)
    like[1] = 0
    change = at_dose(exchanged(rows, moved, drawn[:, :2]), like)
    assert change[0].isnan().all() and not change[1].any()  # nothing differs; nothing is to be matched
    torch.testing.assert_close(change[2:].norm(dim=1), like[2:].norm(dim=1))
    by_hand = sum(moved[2, i] * rows[i] for i in drawn[2, :2])
    torch.testing.assert_close(change[2], by_hand * like[2].norm() / by_hand.norm())
