"""Sums over prompts and early exits, against plain forward passes and numpy."""

from typing import Any

import numpy as np
import pytest
import torch

from diagnostics.sampling.counted import Tokens
from diagnostics.scaling_laws.work import early_exits, prompt_sums, shares_of_compute
from interventions import record
from interventions.models.wrapping import wrap
from interventions.texts.prompts import prompts_for
from tests.diagnostics.scaling_laws.grids import PROMPTS, SITE, grid
from tests.tiny import N_LAYERS, tiny_model


def measured(name="llama", sink_filter: float | None = 1.3, n=6) -> Any:
    model = wrap(tiny_model(name))
    text = prompts_for(model, PROMPTS)
    tokens = Tokens(record(model, text.tokens, (SITE,), keep_cache=False), SITE, text.special, sink_filter, 1)
    saes = dict(list(grid().items())[:3])
    return model, tokens, saes, prompt_sums(tokens, saes, n, "auto", lambda _: None)


def test_sums_match_forward_passes_with_a_hook():
    model, tokens, saes, (frame, text, kinds, usable, _) = measured()
    counted = iter(tokens.counted[tokens.strict])
    keeps = [np.array([next(counted) for _ in ids]) for ids in PROMPTS]
    every = torch.cat(
        [
            model.hf(torch.tensor([ids]), output_hidden_states=True).hidden_states[4][0][k]
            for ids, k in zip(PROMPTS, keeps, strict=True)
        ]
    )
    mean = every.detach().double().mean(0)
    assert 0 < len(every) < sum(map(len, PROMPTS)) - len(PROMPTS)  # sinks are left out, and first tokens
    for name, sae in saes.items():
        own, active, fired = (
            frame[frame["sae"] == name].set_index("prompt"),
            0,
            torch.zeros(sae.d_sae, dtype=torch.bool),
        )
        for i, (ids, keep) in enumerate(zip(PROMPTS, keeps, strict=True)):
            clean = model.hf(torch.tensor([ids]), output_hidden_states=True)
            x = clean.hidden_states[4][0].detach()
            new = x.clone()
            new[keep] = sae(x[keep])
            active, fired = active + int((sae.encode(x[keep]) != 0).sum()), fired | (sae.encode(x[keep]) != 0).any(0)
            assert own.loc[i, "error"] == pytest.approx(float((x - new).double().square().sum()), rel=1e-5)
            assert text.loc[i, "variance"] == pytest.approx(float((x[keep].double() - mean).square().sum()), rel=1e-5)
            if i >= 6:
                assert own.loc[i, ["kl", "ce"]].tolist() == [0, 0] and text.loc[i, "n_spliced"] == 0
                continue
            hook = model.hf.model.layers[3].register_forward_hook(lambda *_, new=new: new[None])
            logits = model.hf(torch.tensor([ids])).logits[0].detach().log_softmax(-1)
            hook.remove()
            p, last = clean.logits[0].detach().log_softmax(-1), torch.tensor(keep[:-1])
            kl = (p.exp() * (p - logits)).sum(-1)[:-1][last].sum()
            ce, ce_clean = (-q[:-1].gather(1, torch.tensor(ids[1:])[:, None])[last].sum() for q in (logits, p))
            assert text.loc[i, "n_spliced"] == int(last.sum())
            for name_, value, expected in (
                ("kl", own.loc[i, "kl"], kl),
                ("ce", own.loc[i, "ce"], ce),
                ("clean", text.loc[i, "ce_clean"], ce_clean),
            ):
                assert value == pytest.approx(float(expected), rel=1e-3, abs=1e-3), name_
        line = kinds.set_index("sae").loc[name]
        assert line["l0"] == pytest.approx(active / len(every)) and line["silent"] == pytest.approx(
            float((~fired).float().mean())
        )
    assert int(usable.sum()) == text["n_spliced"].sum()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_early_exit_applies_the_head_to_an_earlier_layer(name):
    model, tokens, _, (_, text, _, usable, _) = measured(name, sink_filter=None)
    found = early_exits(model, tokens, usable, lambda _: None).set_index(["layer", "prompt"])
    base = model.hf.base_model
    norm = getattr(base, {"llama": "norm", "gpt2": "ln_f", "gpt_neox": "final_layer_norm"}[name])
    for i, ids in enumerate(PROMPTS[:6]):
        streams = model.hf(torch.tensor([ids]), output_hidden_states=True).hidden_states
        for layer in range(N_LAYERS):
            last = layer == N_LAYERS - 1  # Hugging Face gives the last one after the norm
            logits = model.hf.get_output_embeddings()(streams[layer + 1] if last else norm(streams[layer + 1]))[0, :-1]
            ce = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
            assert found.loc[(layer, i), "ce"] == pytest.approx(float(ce), rel=1e-4)
        assert found.loc[(N_LAYERS - 1, i), "ce"] == pytest.approx(text.loc[i, "ce_clean"], rel=1e-4)
        assert found.loc[(0, i), "n"] == len(ids) - 1


def test_shares_of_compute_count_matrices():
    """Of the tiny Llama: attention 32 x 32 twice and 32 x 16 twice, MLP three times 32 x 64; 97 x 32 for the unembedding."""
    block, head = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64, 97 * 32
    expected = (np.arange(1, 7) * block + head) / (6 * block + head)
    np.testing.assert_allclose(shares_of_compute(wrap(tiny_model("llama"))), expected)
