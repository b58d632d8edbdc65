"""Ctrl-C in a diagnostic leaves the model clean, and the same call then gives the same result."""

import pandas as pd
import pytest
import torch

from diagnostics import causal_atlas, direction_norm, projection_effects
from interventions import Site, record
from sae_models.architectures import build, named
from tests.interrupted import at_module, left_on
from tests.tiny import D_MODEL, bridge, fresh, prompts, traced

pytestmark = pytest.mark.filterwarnings("ignore:an interval from .* prompts")
PROMPTS = prompts(tuple(8 + i % 5 for i in range(12)))
SITE = Site(2)


@pytest.fixture(scope="module")
def sae():
    x = record(fresh("llama"), PROMPTS, [SITE]).activations[SITE].reshape(-1, D_MODEL)
    return build(
        named("standard:topk"), 48, 5, x, torch.Generator().manual_seed(1), hook_name=SITE.hook_name
    ).requires_grad_(False)


def called(name: str, model, sae, **how):
    if name == "direction_norm":
        return direction_norm(model, PROMPTS, layers=[1, 4], pairs=12, pair_sets=["random"], **how)
    if name == "causal_atlas":
        return causal_atlas(model, PROMPTS, sae, path_share=0.2, **how)
    return projection_effects(model, PROMPTS, sae, latents=4, tokens_per_latent=6, **how)


@pytest.mark.parametrize(
    ("name", "wrapper"),
    [
        ("direction_norm", "huggingface"),
        ("causal_atlas", "nnsight"),
        pytest.param("projection_effects", "transformer_lens", marks=pytest.mark.bridge),
    ],
)
def test_ctrl_c_leaves_the_model_clean_and_the_run_resumable(name, wrapper, sae, tmp_path):
    hf = fresh("llama")
    model = {"huggingface": lambda m: m, "transformer_lens": lambda m: bridge("llama", m), "nnsight": traced}[wrapper](
        hf
    )
    looked_at = [hf, model] if wrapper == "transformer_lens" else [hf]
    seen: list[str] = []
    with at_module(-1, seen):
        expected = called(name, model, sae, folder=tmp_path / "whole")
    before = left_on(*looked_at)
    for share in (0.2, 0.7):  # in a folder, which keeps finished units
        with pytest.raises(KeyboardInterrupt), at_module(1 + int(share * (len(seen) - 1))):
            called(name, model, sae, folder=tmp_path / "resumed")
        assert left_on(*looked_at) == before

    units = tmp_path / "resumed" / "units"

    def stop(*_):
        if any(units.glob("*.parquet")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        called(name, model, sae, folder=tmp_path / "resumed", progress=stop)
    assert left_on(*looked_at) == before
    resumed = called(name, model, sae, folder=tmp_path / "resumed")
    pd.testing.assert_frame_equal(resumed.frame, expected.frame, check_exact=True)
    assert resumed.provenance == expected.provenance
    # replay is checked at the same units, so that replay_delta cannot depend on interruptions
    whole, again = sorted((tmp_path / "whole" / "units").iterdir()), sorted(units.iterdir())
    assert [(path.name, path.read_bytes()) for path in again] == [(path.name, path.read_bytes()) for path in whole]
    assert left_on(*looked_at) == before
