"""Latents of either sign: to turn some around, rows and signs, changes what z says and nothing that a question measures."""

import copy
import functools
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from diagnostics import (
    ablation_sparsity,
    atom_substitution,
    causal_atlas,
    causal_concentration,
    compare_dictionaries,
    disentangle,
    evaluate_saes,
    interactions,
    latent_steering,
    perturb_probes,
)
from interventions import Site, record, wrap
from sae_models.architectures import build, named
from sae_models.gates import SignedGate
from tests.diagnostics.disentanglement import made_facts
from tests.diagnostics.sparse_probing import test_run as probing
from tests.tiny import D_MODEL, prompts, tiny_model, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SITE = Site(2)
PROMPTS = prompts(tuple(9 + i % 4 for i in range(24)))
D_SAE = 48


def model():
    return tiny_model("llama", dtype=torch.float64)


@functools.cache
def pair(selector: str):
    """An SAE, and the same with every other latent turned around."""
    x = record(model(), PROMPTS, [SITE]).activations[SITE].reshape(-1, D_MODEL)
    stream = torch.Generator().manual_seed(1)
    sae = build(named(f"standard:{selector}"), D_SAE, 5, x, stream, hook_name=SITE.hook_name).requires_grad_(False)
    for weight in sae.parameters():
        weight.add_(0.1 * torch.randn(weight.shape, generator=stream, dtype=weight.dtype))
    if isinstance(sae.selector, SignedGate):  # a dead zone
        sae.selector.b_gate.sub_(1.0)
        sae.selector.b_gate_negative.sub_(1.0)
    turned = copy.deepcopy(sae)
    for rows in (turned.score.W_enc, turned.W_dec):
        rows[::2] *= -1
    if isinstance(sae.selector, SignedGate):
        one, other = sae.selector, turned.selector
        for here, there in ((one.b_gate, other.b_gate_negative), (one.b_gate_negative, other.b_gate), (one.r_mag, other.r_mag_negative), (one.r_mag_negative, other.r_mag)):  # fmt: skip
            there[::2] = here[::2]
    else:
        turned.score.b_enc[::2] *= -1
    z, back = sae.encode(x), turned.encode(x)
    sign = torch.ones(D_SAE, dtype=z.dtype)
    sign[::2] = -1
    torch.testing.assert_close(back, z * sign)
    assert (z < 0).any() and (z > 0).any()
    return sae, turned


@functools.cache
def facts():
    with tempfile.TemporaryDirectory() as folder:
        return made_facts.answered(Path(folder))


def texted():
    return wrap(model(), tokenizer(), "owner/tiny")


ASKED = {
    "disentangle": lambda sae: disentangle(texted(), {"one": sae}, facts(), ks=(3,), pairs=6, learn=2).frame,
    "perturb_probes": lambda sae: perturb_probes(texted(), [probing.SETS[1]], {"one": sae}, ks=(1, 4), seeds=1).frame,
    "causal_atlas": lambda sae: causal_atlas(model(), PROMPTS, {"one": sae}, path_share=0.3, placebo_share=0.5).frame,
    "interactions": lambda sae: interactions(model(), PROMPTS, {"one": sae}, n_tokens=30, per_token=4).frame,
    "causal_concentration": lambda sae: causal_concentration(model(), PROMPTS, {"one": sae}, n_tokens=30).frame,
    "ablation_sparsity": lambda sae: (
        ablation_sparsity(model(), PROMPTS, {"one": sae}, latents=8, tokens_per_latent=5, horizon=2).frame
    ),
    "atom_substitution": lambda sae: (
        atom_substitution(model(), PROMPTS, {"one": sae}, latents=6, tokens_per_latent=8).frame
    ),
    "latent_steering": lambda sae: (
        latent_steering(model(), PROMPTS, {"one": sae}, latents=4, n_tokens=12, min_active=4).frame
    ),
    "evaluate_saes": lambda sae: evaluate_saes(model(), PROMPTS, {"one": sae}, splice_prompts=None).frame,
    "compare_dictionaries": lambda sae: (
        compare_dictionaries(
            model(), PROMPTS, {"one": sae, "other": pair("abstopk")[0]}, causal_latents=6, causal_tokens=5, min_active=4
        ).frame
    ),
}
SIGNED = {"z", "inner", "cosine", "z_i", "z_j", "decoder_cosine", "mean_activation"}
"""Columns that turn around with their latent."""


@pytest.mark.parametrize("selector", ["abstopk", "signed_gated"])
@pytest.mark.parametrize("question", ASKED)
def test_mirrored_latents_give_the_same_answers(question, selector):
    one, other = (ASKED[question](sae) for sae in pair(selector))
    assert list(one.columns) == list(other.columns) and len(one) == len(other) > 0
    for column in one.columns:
        a, b = one[column], other[column]
        if not pd.api.types.is_numeric_dtype(a):
            assert (a.astype(str) == b.astype(str)).all(), column
            continue
        a, b = a.to_numpy(float), b.to_numpy(float)
        if column in SIGNED:
            a, b = np.abs(a), np.abs(b)
        if column == "negative_share":
            a, b = np.abs(a - 0.5), np.abs(b - 0.5)
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7, err_msg=column)
