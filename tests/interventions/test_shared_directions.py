"""Changes along directions: the same effects as the vectors they stand for, direct effects by the short way where it is exact."""

import pytest
import torch

from interventions import EditError, Site, measure, record, wrap
from interventions import shared_directions as module
from interventions.replaying.rows import Reference
from interventions.shared_directions import Directions
from tests.tiny import D_MODEL, prompts, rows, tiny_model

SITE = Site(3)
METRICS = ("kl", "kl_direct", "top1_changed")


def case(name: str, dtype: torch.dtype = torch.float32):
    recording = record(wrap(tiny_model(name, dtype=dtype)), prompts(), [SITE])
    prompt, position = rows()
    stream = torch.Generator().manual_seed(4)
    matrix = torch.randn(9, D_MODEL, generator=stream, dtype=dtype)
    matrix[4] = 0  # a pruned latent: it changes nothing, and spoils nothing
    directions = Directions(matrix)
    index = torch.randint(9, (len(prompt),), generator=stream)
    coefficient = 0.5 * torch.randn(len(prompt), generator=stream, dtype=dtype)
    coefficient[3] = 0  # put back as it was
    return recording, prompt, position, directions.times(coefficient, index)


# RMSNorm, RMSNorm of 1 + weight, LayerNorm and a head with biases (phi), and a soft cap (gemma2), which is not linear.
@pytest.mark.parametrize("name", ["llama", "gemma3", "phi", "gemma2"])
def test_effects_equal_those_of_full_vectors(name, monkeypatch):
    recording, prompt, position, along = case(name)
    taken: list[bool] = []

    def watched(self, *given, own=module.Along.logits):
        found = own(self, *given)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(module.Along, "logits", watched)
    x = recording.at(SITE, prompt, position)
    vectors = x + along.coefficient[:, None] * along.directions.matrix[along.index]
    plain = measure(recording, SITE, prompt, position, vectors, metrics=METRICS)
    short = measure(recording, SITE, prompt, position, along, metrics=METRICS)
    assert taken and all(taken) == (name != "gemma2") and plain.path == short.path == "replay"
    for metric in ("kl", "kl_direct"):
        torch.testing.assert_close(short[metric], plain[metric], rtol=1e-3, atol=1e-9)
    assert float(short["kl_direct"][3]) < 1e-10 < float(short["kl_direct"].max())
    slow = measure(recording, SITE, prompt, position, along, metrics=METRICS, path="hooks")
    torch.testing.assert_close(short["kl_direct"], slow["kl_direct"], rtol=1e-3, atol=1e-7)


def test_effects_are_exact_in_float64():
    recording, prompt, position, along = case("llama", torch.float64)
    vectors = recording.at(SITE, prompt, position) + along.change(torch.arange(len(prompt)))
    plain = measure(recording, SITE, prompt, position, vectors, metrics=METRICS)
    short = measure(recording, SITE, prompt, position, along, metrics=METRICS)
    torch.testing.assert_close(short["kl_direct"], plain["kl_direct"], rtol=1e-7, atol=1e-16)


def test_a_table_beyond_the_memory_limit_is_not_built(monkeypatch):
    recording, prompt, position, along = case("llama")
    short = measure(recording, SITE, prompt, position, along, metrics=METRICS)
    monkeypatch.setattr(module, "TABLE_BYTES", 100)
    assert along.directions.table(recording) is None
    plain = measure(recording, SITE, prompt, position, along, metrics=METRICS)
    torch.testing.assert_close(short["kl_direct"], plain["kl_direct"], rtol=1e-3, atol=1e-9)


def test_invalid_arguments_raise():
    recording, prompt, position, along = case("llama")
    with pytest.raises(EditError, match="there are 9, from 0"):
        along.directions.times(torch.zeros(2), torch.tensor([0, 9]))
    with pytest.raises(EditError, match="one position for each"):
        measure(recording, SITE, prompt[:2], position[:2], along)
    reference = Reference(torch.zeros(1, D_MODEL), torch.zeros(len(prompt), dtype=torch.long))
    with pytest.raises(EditError, match="no reference"):
        measure(recording, SITE, prompt, position, along, reference=reference)
