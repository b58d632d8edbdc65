"""Arguments in their short forms are the long ones."""

import pandas as pd
import pytest

from diagnostics.direction_vs_norm.run import direction_norm
from diagnostics.dose.run import dose_response
from diagnostics.running.clean import chosen_sites
from interventions import ResultError, Site, TextError, wrap
from tests.tiny import fresh, prompts, tiny_model, tokenizer

TEXTS = [" ".join(f"w{i}" for i in ids) for ids in prompts((9, 12, 10, 11))]
TOKENS = [tokenizer()(text)["input_ids"] for text in TEXTS]


def test_layers_and_sites_in_every_form():
    model = wrap(tiny_model("llama"))
    assert chosen_sites(model, 1, None) == chosen_sites(model, [1], None) == (Site(1),)
    assert chosen_sites(model, None, "blocks.1.hook_mlp_out") == (Site(1, "mlp_out"),)
    assert chosen_sites(model, (1, 3), "mlp_out") == (Site(1, "mlp_out"), Site(3, "mlp_out"))
    assert chosen_sites(model, 1, ["mlp_out", Site(3)]) == (Site(1, "mlp_out"), Site(3))
    assert {site.point for site in chosen_sites(model, None, "mlp_out")} == {"mlp_out"}
    with pytest.raises(ResultError, match="layers and sites both given"):
        chosen_sites(model, 1, "3.mlp_out")


def test_diagnostic_accepts_single_values_and_keeps_the_mode():
    """Also for a model in train mode, which stays in train mode."""
    hf = fresh("llama").train()
    hf.model.layers[1].eval()
    modes = [module.training for module in hf.modules()]
    short = direction_norm(wrap(hf, tokenizer()), TEXTS, layers=1, pairs=12, pair_sets="random")
    long = direction_norm(wrap(fresh("llama"), tokenizer()), TOKENS, sites=[Site(1)], pairs=12, pair_sets=["random"])
    pd.testing.assert_frame_equal(short.frame, long.frame)
    assert [module.training for module in hf.modules()] == modes
    with pytest.raises(ResultError, match="no pair set 'randm'; known: random, same_norm"):
        direction_norm(hf, TOKENS, layers=1, pair_sets="randm")
    with pytest.raises(TextError, match=r"wrap\(model, tokenizer\)"):
        direction_norm(hf, TEXTS, layers=1)
    assert [module.training for module in hf.modules()] == modes


def test_one_dose_and_one_direction_need_no_list():
    model = wrap(fresh("llama"))
    direction = model.hf.get_output_embeddings().weight[5].detach()
    short = dose_response(model, TOKENS, layers=1, doses=0.2, directions=direction, tokens=6)
    long = dose_response(model, TOKENS, layers=[1], doses=[0.2], directions={"given": direction.tolist()}, tokens=6)
    pd.testing.assert_frame_equal(short.frame, long.frame)
