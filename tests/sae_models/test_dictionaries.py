"""Dictionaries: read as their SAE reads them, refused where they do not belong."""

import pytest
import torch

from interventions import EditError, ResultError, Site, SiteError, wrap
from sae_models.architectures import build, named
from sae_models.dictionaries import by_name, dictionaries_of
from sae_models.errors import BelongingError
from sae_models.live import as_sae
from sae_models.saving import save_sae
from tests.tiny import D_MODEL, tiny_model

SITE = Site(2)


def sae_of(name: str = "cosine:topk", hook: str | None = SITE.hook_name, width: int = D_MODEL):
    x = torch.randn(60, width, generator=torch.Generator().manual_seed(0))
    sae = build(named(name), 40, 5, x, torch.Generator().manual_seed(1), hook_name=hook).requires_grad_(False)
    for weight in sae.parameters():
        weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))
    return sae


class Foreign:
    """What as_sae wraps: a function, with no encoder rows to show."""

    def __init__(self, sae):
        self.sae, self.W_dec, self.hook_name, self.model_name = sae, sae.W_dec.data, sae.hook_name, None

    def encode(self, x):
        return self.sae.encode(x)

    def decode(self, z):
        return z @ self.W_dec


@pytest.fixture(scope="module")
def model():
    return wrap(tiny_model("llama"))


def test_dictionary_of_an_sae_equals_the_sae(model):
    sae = sae_of()
    (probe,) = dictionaries_of({"mine": sae}, model, None)
    assert (probe.name, probe.site, len(probe)) == ("mine", SITE, 40)
    x, latent = torch.randn(9, D_MODEL), torch.arange(9) * 4
    z, x_c = probe.activation(x, latent)
    assert torch.equal(z, sae.encode(x)[torch.arange(9), latent]) and torch.equal(x_c, x - sae.b_dec)
    assert torch.equal(probe.directions, sae.W_dec) and torch.equal(probe.rows, sae.encoder_rows())
    assert torch.equal(probe.learned, sae.score.exponents())
    assert probe.provenance()["learned_a"]["mean"] == pytest.approx(float(sae.score.exponents().mean()))
    assert dictionaries_of(sae_of("standard:topk"), model, SITE)[0].learned is None


def test_wrapped_sae_has_no_encoder_rows(model):
    inner = sae_of("standard:relu")
    inner.b_dec.zero_()
    (probe,) = dictionaries_of(as_sae(Foreign(inner)), model, None)
    x = torch.randn(5, D_MODEL)
    assert probe.rows is None and probe.learned is None
    assert torch.equal(probe.activation(x, torch.arange(5))[0], inner.encode(x)[torch.arange(5), torch.arange(5)])


def test_digest_depends_on_weights_and_scores(model):
    saes = [sae_of(), sae_of(), sae_of("standard:topk")]
    saes[1].score.b_enc.data[3] += 1e-3
    digests = {dictionaries_of(sae, model, None)[0].provenance()["sha256"] for sae in [*saes, sae_of()]}
    assert len(digests) == 3


def test_directions_need_a_site(model):
    one = dictionaries_of(torch.ones(D_MODEL), model, SITE)[0]
    assert one.name == "directions" and one.directions.shape == (1, D_MODEL) and one.sae is None
    with pytest.raises(SiteError, match=r"do not say where they act; give site=Site\(layer\)"):
        dictionaries_of(torch.ones(3, D_MODEL), model, None)
    for wrong in (torch.ones(3, D_MODEL + 1), torch.zeros(2, D_MODEL), torch.full((1, D_MODEL), torch.nan)):
        with pytest.raises(EditError, match="finite and not zero"):
            dictionaries_of({"d": wrong}, model, SITE)


@pytest.mark.parametrize(("value", "said"), [(0.0, "zero"), (float("inf"), "not finite"), (1e300, "not finite")])
def test_invalid_direction_is_named(model, value, said):
    rows = torch.ones(4, D_MODEL, dtype=torch.float64)
    rows[2] = value
    with pytest.raises(EditError, match=f"'d' of shape .*: number 2 is {said} in float32"):
        dictionaries_of({"d": rows}, model, SITE)


def test_mismatched_dictionaries_raise(model):
    with pytest.raises(BelongingError, match="of width 16"):
        dictionaries_of(sae_of(width=16), model, None)
    with pytest.raises(BelongingError, match="put to site"):
        dictionaries_of(sae_of(), model, Site(3))
    with pytest.raises(ResultError, match="no SAE and no directions"):
        dictionaries_of({}, model, None)


def test_saes_may_be_single_listed_named_or_a_path(model, tmp_path):
    """The same SAE in every form. SAEs in a list are named after what they are; equal names get numbers."""
    sae = sae_of()
    save_sae(sae, tmp_path / "mine")
    given = {
        "one": sae,
        "several": [sae],
        "named": {"x": sae},
        "path": str(tmp_path / "mine"),
        "Path": tmp_path / "mine",
    }
    found = {how: dictionaries_of(thing, model, "2.resid_post") for how, thing in given.items()}
    for how, (one,) in found.items():
        assert torch.equal(one.directions, sae.W_dec) and one.site == SITE, how
    names = [one.name for (one,) in found.values()]
    assert names == ["cosine", f"cosine:topk 40 {SITE.hook_name}", "x", *[str(tmp_path / "mine")] * 2]
    assert list(by_name([sae, sae])) == [names[1], f"{names[1]} #2"]
    with pytest.raises(ResultError, match="give at least one"):
        by_name([])
    ours = sae_of(hook="2.resid_post")
    assert dictionaries_of(ours, model, SITE)[0].site == SITE
    with pytest.raises(BelongingError, match="put to site"):
        dictionaries_of(ours, model, "3.resid_post")
