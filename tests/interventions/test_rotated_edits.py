"""The geometry of a set of edits is kept to rounding, whatever they are; all else is drawn."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from interventions import EditError
from interventions.edits import rotated_edits


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(edits=st.integers(1, 9), d_model=st.integers(3, 8), seed=st.integers(0, 99), dependent=st.booleans())
def test_norms_and_cosines_to_x_and_between_edits_are_kept(edits, d_model, seed, dependent):
    """Also with more edits than dimensions, and with repeated or zero edits."""
    x, deltas = drawn(d_model, seed=seed), drawn(edits, d_model, seed=seed + 1)
    if dependent:
        deltas[-1], deltas[0] = 2 * deltas[0], 0
    turned = rotated_edits(x, deltas, drawn(max(edits, d_model), d_model, seed=seed + 2))
    torch.testing.assert_close(turned @ turned.T, deltas @ deltas.T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(turned @ x, deltas @ x, rtol=1e-9, atol=1e-9)
    assert dependent or d_model < 4 or not torch.allclose(turned, deltas, atol=1e-3)


def test_single_edit_is_rotated_towards_the_first_direction():
    """This is the known placebo of a single edit: the part along x is kept, the rest points in the direction given."""
    x, delta, towards = torch.tensor([2.0, 0, 0]), torch.tensor([[1.0, 0, 3.0]]), torch.tensor([[5.0, 7.0, 0]])
    torch.testing.assert_close(rotated_edits(x, delta, towards).abs(), torch.tensor([[1.0, 3.0, 0]]))


def test_rotated_edits_average_to_their_part_along_x():
    """Directions are isotropic, so the rest of the edit averages to zero."""
    x, delta = drawn(5, seed=0), drawn(1, 5, seed=1)
    some = torch.cat([rotated_edits(x, delta, drawn(1, 5, seed=i)) for i in range(10, 2010)])
    along = (delta @ x) / (x @ x) * x
    assert (some.mean(0) - along).norm() < 5 * delta.norm() / 2000**0.5


def test_zero_and_repeated_directions_are_skipped():
    x, deltas, good = drawn(6, seed=0), drawn(3, 6, seed=1), drawn(3, 6, seed=2)
    again = 2 * good[:1] + 1e-6 * drawn(1, 6, seed=3)
    spare = torch.cat(
        [torch.zeros(1, 6), good[:1], again, 3 * x[None], good[1:2], torch.full((1, 6), torch.nan), good[2:]]
    )
    torch.testing.assert_close(rotated_edits(x, deltas, spare), rotated_edits(x, deltas, good))


def test_too_few_directions_raise_or_give_nan():
    x, deltas = drawn(6, seed=0), drawn(3, 6, seed=1)
    with pytest.raises(EditError, match="2 random directions for edits of 3"):
        rotated_edits(x, deltas, drawn(2, 6, seed=2))
    assert rotated_edits(x, deltas, drawn(1, 6, seed=2).expand(9, 6)).isnan().all()
