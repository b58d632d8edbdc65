"""Sizes of changes of logits against the sums written out."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from interventions.logit_changes import centred, cosine, kl_of, rms, spread
from tests.tiny import exact_kl


def drawn(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(11, generator=generator, dtype=torch.float64), torch.randn(
        3, 11, generator=generator, dtype=torch.float64
    )


@given(seed=st.integers(0, 999), constant=st.floats(-20, 20), factor=st.floats(0.1, 10))
def test_sizes_equal_written_out_sums_and_ignore_constants(seed, constant, factor):
    logits, change = drawn(seed)
    p = logits.softmax(0)
    by_hand = torch.stack([sum(p[v] * (c[v] - c.mean()) ** 2 for v in range(11)) ** 0.5 for c in change])
    mean = change @ p
    deviation = torch.stack(
        [sum(p[v] * (c[v] - m) ** 2 for v in range(11)) ** 0.5 for c, m in zip(change, mean, strict=True)]
    )
    for found, expected in ((rms(change, p), by_hand), (spread(change, p), deviation)):
        torch.testing.assert_close(found, expected)
    for size in (rms, spread):
        torch.testing.assert_close(size(factor * change + constant, p), factor * size(change, p), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(cosine(change, factor * change + constant, p), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(
        kl_of(logits, change + constant), exact_kl(logits, logits + change), rtol=1e-6, atol=1e-12
    )


def test_kl_of_a_small_change_is_half_its_squared_spread():
    logits, change = drawn(0)
    small = 1e-4 * change
    torch.testing.assert_close(kl_of(logits, small), spread(small, logits.softmax(0)) ** 2 / 2, rtol=1e-3, atol=0)


def test_zero_change_has_no_cosine():
    logits, change = drawn(0)
    assert cosine(0 * change, change, logits.softmax(0)).isnan().all()
    assert (centred(torch.ones(2, 5)) == 0).all()
