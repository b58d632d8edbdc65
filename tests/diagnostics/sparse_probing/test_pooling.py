"""Mean activations and latents of texts, against a full recording averaged token by token."""

import functools

import numpy as np
import pytest
import torch

from diagnostics.sparse_probing.pooling import labelled_prompts, pooled_texts
from interventions import ResultError, Site, TextError, record, wrap
from interventions.texts.labelled import Labelled
from sae_models.architectures import build, named
from tests.tiny import D_MODEL, fresh, prompts, tiny_model, tokenizer

SITES = (Site(3), Site(1, "mlp_out"))
SINK, SPECIAL = 5, 2
"""Token ids: a sink of the residual stream (not of MLP outputs), and one that the tokenizer counts as special."""
LENGTHS = (9, 4, 12, 2, 7, 7, 3, 11)
# The tokenizer reads w25 as the special w2 and an unknown word.
TOKENS = [[8 if token in (SINK, SPECIAL) or token // 10 == 2 else token for token in ids] for ids in prompts(LENGTHS)]
for row in (2, 3, 4):
    TOKENS[row][1] = SINK  # the prompt of two tokens has nothing else that counts
TOKENS[0][4] = SPECIAL
TEXTS = [" ".join(f"w{token}" for token in ids) for ids in TOKENS]


@functools.cache
def model():
    """A llama with a token that is a sink everywhere."""
    hf = fresh("llama")
    hf.model.embed_tokens.weight[SINK] *= 2e4
    return wrap(hf, tokenizer())


def labelled(texts=TEXTS) -> Labelled:
    groups = [f"group {i // 2}" for i in range(len(texts))]
    return Labelled(texts, ["ab"[i % 2] for i in range(len(texts))], "given", "0", "mine", "by hand", groups=groups)


def by_hand(site: Site) -> tuple[list[list[torch.Tensor]], list[str]]:
    """The activations of each text that count, in the order of `labelled_prompts`; and the texts."""
    order, *_ = labelled_prompts(model(), labelled())
    recording = record(model(), order.tokens, [site], keep_cache=False)
    x = recording.activations[site]
    every = torch.cat([row[: len(ids)] for row, ids in zip(x, order.tokens, strict=True)])
    limit = 10 * np.median(every.norm(dim=1).numpy())
    kept = [
        [v for p, (v, t) in enumerate(zip(row, ids, strict=False)) if p and t != SPECIAL and float(v.norm()) <= limit]
        for row, ids in zip(x, order.tokens, strict=True)
    ]
    return kept, order.texts


@pytest.mark.parametrize("site", SITES, ids=str)
def test_means_are_over_the_tokens_that_count(site):
    pooled = pooled_texts(model(), labelled(), SITES)
    kept, texts = by_hand(site)
    assert pooled.prompts.texts == texts
    assert pooled.labels == ["ab"[TEXTS.index(text) % 2] for text in texts]
    assert pooled.groups == [f"group {TEXTS.index(text) // 2}" for text in texts]
    x = pooled.mean_activations(site)
    sae = build(
        named("standard"), 24, 5, torch.cat([torch.stack(v) for v in kept if v]), torch.Generator().manual_seed(0)
    )
    sae.selector.threshold.fill_(0.1)
    z = pooled.mean_latents(sae.requires_grad_(False), site)
    usable = pooled.usable(site)
    for i, vectors in enumerate(kept):
        assert usable[i] == bool(vectors)
        if not vectors:
            assert bool(x[i].isnan().all()) and bool(z[i].isnan().all())
            continue
        torch.testing.assert_close(x[i], torch.stack(vectors).mean(0), rtol=1e-4, atol=1e-4)
        one_by_one = torch.stack([sae.encode(v[None])[0] for v in vectors]).mean(0)
        torch.testing.assert_close(z[i], one_by_one, rtol=1e-4, atol=1e-4)
    assert (z[usable] != 0).any()
    some = pooled.left_out(site)
    sinks = {"sink": 3, "whole texts": 1} if site == SITES[0] else {}
    assert some == {"position 0": len(TEXTS), "special token": 1} | sinks


def test_without_a_sink_filter_all_texts_count():
    pooled = pooled_texts(model(), labelled(), SITES, sink_filter=None)
    assert pooled.usable(SITES[0]).all() and pooled.left_out(SITES[0]) == {"position 0": len(TEXTS), "special token": 1}


def test_texts_are_cut_and_ordered_by_the_seed():
    pooled = pooled_texts(model(), labelled(), SITES[:1], max_length=4)
    assert max(map(len, pooled.prompts.tokens)) == 4
    assert len(pooled.prompt) == len(pooled.activations[SITES[0]]) == sum(min(n, 4) for n in LENGTHS)
    assert pooled_texts(model(), labelled(), SITES[:1], seed=1).prompts.texts != pooled.prompts.texts


def test_results_do_not_depend_on_padding_and_batches(monkeypatch):
    whole = pooled_texts(model(), labelled(), SITES).activations
    monkeypatch.setattr("diagnostics.sparse_probing.pooling._TOKENS", 1)
    alone = pooled_texts(model(), labelled(), SITES).activations
    for site in SITES:
        torch.testing.assert_close(whole[site], alone[site], rtol=1e-4, atol=1e-4)


def test_invalid_texts_raise():
    with pytest.raises(TextError, match="has no tokenizer"):
        pooled_texts(wrap(tiny_model("llama")), labelled(), SITES)
    short = pooled_texts(model(), labelled(["w9 w2", "w7 w2"]), SITES)
    with pytest.raises(ResultError, match=r"no token is left at 3.resid_post: .*'special token': 2"):
        short.mean_activations(SITES[0])
    assert short.activations[SITES[0]].shape == (4, D_MODEL)
