"""Changes of the residual stream at many tokens, against full forward passes of each text alone."""

import pytest
import torch

from interventions import EditError, Site, record, wrap
from interventions.spliced import Passes
from interventions.stream_effects import stream_effects
from tests.tiny import (
    D_MODEL,
    TOLERANCE,
    VOCAB,
    assert_same_effect,
    exact_kl,
    forward_alone,
    fresh,
    prompts,
    tiny_model,
)

TOKENS = prompts((14, 9, 11, 6, 12))
TARGETS = [3, 40]


def prepared(site, name="llama"):
    recording = record(wrap(tiny_model(name)), TOKENS, [site], keep_cache=False)
    counted = torch.arange(14)[None] < recording.length[:, None]
    counted[:, 0] = False
    reads = counted & (torch.arange(14)[None] % 3 != 1)
    return Passes(recording, site, counted), counted, reads


def noise(counted, texts, only=None):
    """A random change for each (text, position); 0 outside `only`."""
    drawn = torch.randn(*counted.shape, D_MODEL, generator=torch.Generator().manual_seed(5))
    if only is not None:
        drawn = drawn * only[..., None]
    return drawn, lambda some: torch.cat([drawn[i][counted[i]] for i in some.tolist()])


@pytest.mark.parametrize("path", ["blocks", "hooks"])
@pytest.mark.parametrize(("name", "site"), [("llama", Site(2)), ("gpt2", Site(3, "mlp_out"))], ids=str)
def test_effects_match_full_forward_passes(name, site, path):
    """Batches of two texts; changes at all tokens, at a few late ones, and at none."""
    passes, counted, reads = prepared(site, name)
    few = torch.zeros(counted.shape, dtype=torch.bool)
    few[0, [5, 8]], few[4, 3] = True, True
    whole, some = noise(counted, TOKENS), noise(counted, TOKENS, few)
    nothing = lambda texts: torch.zeros(int(counted[texts].sum()), D_MODEL)  # noqa: E731
    texts = [4, 0, 2, 3]
    ticks = []
    changes = {"whole": whole[1], "few": some[1], "nothing": nothing}
    how = {"through_blocks": path == "blocks", "batch_tokens": 28, "tick": ticks.append}
    found = stream_effects(passes, texts, reads, changes, TARGETS, **how)
    hf = tiny_model(name)
    for k, drawn in enumerate((whole[0], some[0])):
        for j, text in enumerate(texts):
            edits = {p: lambda x, p=p, d=drawn, t=text: x + d[t, p] for p in counted[text].nonzero()[:, 0].tolist()}
            at = reads[text].nonzero()[:, 0]
            p, q = (forward_alone(name, hf, TOKENS[text], site, e)[at] for e in ({}, edits))
            assert_same_effect(found.kl[k, j : j + 1], exact_kl(p, q).mean()[None], TOLERANCE)
            change = (q - p) - (q - p).mean(-1, keepdim=True)
            rest = torch.ones(VOCAB, dtype=torch.bool)
            rest[TARGETS] = False
            assert float(found.target_fall[k, j]) == pytest.approx(-float(change[:, TARGETS].mean()), abs=2 * TOLERANCE)
            square = float(change[:, rest].square().mean())
            assert float(found.other_square[k, j]) == pytest.approx(square, rel=1e-3, abs=1e-6)
            x = passes.recording.activations[site][text][counted[text]]
            own = (x + drawn[text][counted[text]]).double() - x.double()
            assert int(found.n_edited[k, j]) == int((own != 0).any(-1).sum())
            assert float(found.norm_sum[k, j]) == pytest.approx(float(own.norm(dim=-1).sum()))
            assert float(found.square_sum[k, j]) == pytest.approx(float(own.square().sum()))
            torch.testing.assert_close(found.shift[k, j], own.sum(0))
    assert float(found.kl[1, 0]) > 0 and not found.kl[1, 2:].any()  # texts 2 and 3 are left as they are
    for values in (found.kl, found.target_fall, found.other_square, found.n_edited):
        assert not values[2].any()  # no change is the identity, exactly
    assert (found.passed, found.untouched, found.n_nonfinite) == (4 + 2, 2 + 4, 0)
    assert sum(ticks) == 12
    assert (found.n_reads == reads[texts].sum(1)).all()


def test_nonfinite_effects_are_left_out_for_each_change(monkeypatch):
    """Under one of two changes, the blocks overflow from token 12 on."""
    passes, counted, reads = prepared(Site(2))
    _, change = noise(counted, TOKENS)
    above = passes.above

    def overflowing(texts, width, name, edit):
        found = above(texts, width, name, edit)
        return found.masked_fill((torch.arange(width) >= 12)[:, None], torch.inf) if name == "bad" else found

    monkeypatch.setattr(passes, "above", overflowing)
    found = stream_effects(passes, [0], reads, {"bad": change, "good": change}, TARGETS)
    lost = int(reads[0, 12:].sum())
    assert 0 < lost < int(reads[0].sum()) and found.n_nonfinite == lost
    assert found.n_reads[:, 0].tolist() == [int(reads[0].sum()) - lost, int(reads[0].sum())]
    early = stream_effects(passes, [0], reads & (torch.arange(14) < 12), {"good": change}, TARGETS)
    assert float(found.kl[0]) == pytest.approx(float(early.kl), rel=1e-4)
    assert float(found.kl[1]) == float(stream_effects(passes, [0], reads, {"good": change}, TARGETS).kl)
    none = stream_effects(passes, [0], reads & (torch.arange(14) >= 12), {"bad": change}, TARGETS)
    assert torch.isnan(none.kl).all() and int(none.n_reads) == 0


def test_doses_are_of_the_rounded_edit():
    """A change far below the spacing of bfloat16 at x counts as no edit, has dose 0 and needs no pass."""
    site = Site(2)
    model = wrap(fresh("llama").to(torch.bfloat16))
    recording = record(model, TOKENS, [site], keep_cache=False)
    counted = torch.arange(14)[None] < recording.length[:, None]
    counted[:, 0] = False
    passes = Passes(recording, site, counted)
    x = recording.activations[site][0][counted[0]]

    def change(scale):
        return lambda texts: scale * x.float()

    found = stream_effects(passes, [0], counted, {"tiny": change(1e-4), "some": change(0.01)}, TARGETS)
    assert int(found.n_edited[0]) == float(found.norm_sum[0]) == float(found.kl[0]) == 0 and found.untouched == 1
    expected = (x + 0.01 * x.float()).to(torch.bfloat16).double() - x.double()
    assert float(found.norm_sum[1]) == pytest.approx(float(expected.norm(dim=1).sum()))
    assert float(found.norm_sum[1]) != pytest.approx(float(0.01 * x.double().norm(dim=1).sum()), rel=1e-3)


def test_tokens_before_the_first_change_have_exactly_zero_kl():
    passes, counted, _ = prepared(Site(2))
    only = torch.zeros(counted.shape, dtype=torch.bool)
    only[0, 6] = True
    _, change = noise(counted, TOKENS, only)
    before, after = (counted & side for side in (torch.arange(14) < 6, torch.arange(14) >= 6))
    assert float(stream_effects(passes, [0], before, {"x": change}, TARGETS).kl) == 0
    late = float(stream_effects(passes, [0], after, {"x": change}, TARGETS).kl)
    both = float(stream_effects(passes, [0], counted, {"x": change}, TARGETS).kl)
    assert both * 13 == pytest.approx(late * 8, rel=1e-5) and late > 0


@pytest.mark.parametrize(
    ("targets", "change", "message"),
    [
        ([VOCAB], lambda texts: torch.zeros(13, D_MODEL), "expected one or more of the vocabulary"),
        ([], lambda texts: torch.zeros(13, D_MODEL), "target tokens"),
        (TARGETS, lambda texts: torch.zeros(12, D_MODEL), r"change 'x' gave shape \[12, 32\]; expected \[13, 32\]"),
    ],
)
def test_invalid_arguments_raise(targets, change, message):
    passes, _, reads = prepared(Site(2))
    with pytest.raises(EditError, match=message):
        stream_effects(passes, [0], reads, {"x": change}, targets)
