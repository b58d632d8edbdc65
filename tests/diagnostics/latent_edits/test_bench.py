"""Random directions that a text can give, and doses as the model takes them."""

import pandas as pd
import pytest
import torch

from diagnostics.latent_edits.bench import LatentEdits, parts, repeated
from diagnostics.latent_edits.firings import Firings
from diagnostics.running.clean import CleanActivations, RunSettings
from diagnostics.statistics.tables import PLACEBOS
from interventions.models.wrapping import wrap
from interventions.texts.prompts import as_prompts
from sae_models.dictionaries import dictionaries_of
from tests.planted import SITE, planted_model
from tests.tiny import D_MODEL, prompts, tiny_model


def bench(texts: list[list[int]], dtype: torch.dtype = torch.float32) -> LatentEdits:
    model, sae = wrap(tiny_model("llama", dtype=dtype)), planted_model(torch.float32)[1]
    (dictionary,) = dictionaries_of({"one": sae}, model, None)
    clean = CleanActivations(model, as_prompts(texts, None), RunSettings(sites=(SITE,)))
    return LatentEdits(clean, dictionary, Firings(*clean.tokens, active=None), 0, {})


def items(*tokens: tuple[int, int]) -> pd.DataFrame:
    return pd.DataFrame(tokens, columns=["target_prompt", "target_position"])


def test_directions_are_differences_of_distinct_contexts():
    (first,) = prompts((6,))
    texts = [[*first, i] for i in range(1, 9)]
    one = bench(texts)
    x = torch.stack([one.clean.activations[SITE][p, q] for p, q in zip(*one.clean.tokens, strict=True)])
    differences = (x[:, None] - x[None]).flatten(0, 1)
    found = one.towards("placebo_token", items((0, 3), (7, 6)), 40, "label").flatten(0, 1)
    assert (found.norm(dim=1) > 1e-3).all()
    assert (found[:, None] == differences).all(-1).any(1).all()


@pytest.mark.parametrize("kind", PLACEBOS)
def test_directions_depend_only_on_label_and_token(kind):
    one = bench(prompts((9, 9, 9)))
    both = one.towards(kind, items((0, 3), (2, 6)), 3, "label")
    torch.testing.assert_close(one.towards(kind, items((2, 6)), 3, "label")[0], both[1], rtol=0, atol=0)
    assert not torch.allclose(one.towards(kind, items((2, 6)), 3, "other")[0], both[1])
    assert not torch.allclose(both[0], both[1]) and both.shape == (2, 3, D_MODEL)


def test_single_usable_token_gives_no_token_direction():
    one = bench([[5, 6]] * 3)
    assert one.towards("placebo_token", items((0, 1)), 2, "label").isnan().all()
    assert one.towards("placebo_isotropic", items((0, 1)), 2, "label").isfinite().all()


def test_dose_is_measured_in_the_models_dtype():
    one, x = bench(prompts((9,)), torch.bfloat16), torch.full((1, D_MODEL), 256.0)
    vectors = x[:, None] + torch.tensor([0.5, 2.0])[:, None]  # 256.5 is no bfloat16 number, 258 is
    torch.testing.assert_close(one.dose(x, vectors), torch.tensor([[0.0, 2.0 * D_MODEL**0.5]]))


def test_parts_and_repeats_of_a_table():
    table = items(*((0, q) for q in range(5)))
    assert [part["target_position"].tolist() for part in parts(table, 2)] == [[0, 1], [2, 3], [4]]
    assert all(list(part.index) == list(range(len(part))) for part in parts(table, 2))
    assert repeated(table, 2)["target_position"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
