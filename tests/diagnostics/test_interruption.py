"""Ctrl-C in a diagnostic leaves the model clean, and the same call then gives the same table."""

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


def _of(name: str, model, sae, **how) -> pd.DataFrame:
    if name == "direction_norm":
        return direction_norm(model, PROMPTS, layers=[1, 4], pairs=12, pair_sets=["random"], **how).frame
    if name == "causal_atlas":
        return causal_atlas(model, PROMPTS, sae, path_share=0.2, **how).frame
    return projection_effects(model, PROMPTS, sae, latents=4, tokens_per_latent=6, **how).frame


def _once(seen: list) -> None:
    """A progress callback that interrupts at its first call."""
    if not seen:
        seen.append(1)
        raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["direction_norm", "causal_atlas", "projection_effects"])
@pytest.mark.parametrize(
    "wrapper", ["huggingface", pytest.param("transformer_lens", marks=pytest.mark.bridge), "nnsight"]
)
def test_ctrl_c_leaves_the_model_clean_and_the_work_done(name, wrapper, sae, tmp_path):
    hf = fresh("llama")
    model = {"huggingface": lambda m: m, "transformer_lens": lambda m: bridge("llama", m), "nnsight": traced}[wrapper](
        hf
    )
    looked_at = [hf, model] if wrapper == "transformer_lens" else [hf]
    seen: list[str] = []
    with at_module(-1, seen):
        expected = _of(name, model, sae)
    before = left_on(*looked_at)
    for share in (0.2, 0.7):  # in a folder, which keeps what was done
        with pytest.raises(KeyboardInterrupt), at_module(1 + int(share * (len(seen) - 1))):
            _of(name, model, sae, folder=tmp_path)
        assert left_on(*looked_at) == before
    stopped: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        _of(name, model, sae, folder=tmp_path, progress=lambda *_: _once(stopped))
    assert left_on(*looked_at) == before
    pd.testing.assert_frame_equal(_of(name, model, sae, folder=tmp_path), expected, check_exact=True)
    assert left_on(*looked_at) == before
