"""Models that run elsewhere, by nnsight's rehearsal: traces are sent as source and find nothing of this package."""

import nnsight.ndif
import pytest
import torch

from interventions import ModelError, Site, SiteError, check_site, intervened_logits, record, wrap
from interventions.direct_logits import direct_logits
from interventions.provenance import model_identity
from interventions.replaying.replay import unembed
from sae_models.architectures import build, named
from sae_models.belonging import sae_site
from sae_models.errors import BelongingError
from tests.tiny import D_MODEL, N_LAYERS, TOLERANCE, far_away, fresh, prompts, tiny_model

SITES = [Site(3, "resid_pre"), Site(0, "resid_pre"), Site(2), Site(N_LAYERS - 1)]


@pytest.fixture(autouse=True)
def _package_is_not_sent(monkeypatch):
    """The rehearsal sends code of packages that are not installed; there must be none of ours in a trace."""
    monkeypatch.setattr(nnsight.ndif, "pull_env", lambda *_, **__: None)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def both(request, tmp_path_factory):
    """A model here, and the same far away."""
    hf = tiny_model(request.param)
    return wrap(hf), wrap(far_away(hf, tmp_path_factory.mktemp("model")), remote="local")


def test_recordings_equal_local_ones(both):
    here, there = both
    assert next(there.hf.parameters()).is_meta and there.shapes._replace(as_tuple=here.shapes.as_tuple) == here.shapes
    mine, theirs = (record(model, prompts(), SITES, batch_prompts=4) for model in both)
    assert set(SITES) <= set(theirs.activations) and theirs.keys is None
    for site, x in theirs.activations.items():
        for found, expected, n in zip(x, mine.activations[site], mine.length, strict=True):
            torch.testing.assert_close(found[:n], expected[:n], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(theirs.final_hidden[0, :4], mine.final_hidden[0, :4], rtol=0, atol=TOLERANCE)


def test_provenance_has_the_revision_in_place_of_a_hash(both):
    there = model_identity(both[1])
    assert there["weights_sha256"] == f"{both[1].name}@c0ffee" and "none of the tensors" in there["weights_covered"]
    assert there["device"] == there["processor"] == "remote" and there["dtype"] == "float32"


def test_functions_that_need_a_local_pass_raise(both):
    there = both[1]
    recording, one = record(there, prompts(), [Site(2)]), torch.tensor([1])
    vector = torch.zeros(1, there.d_model)
    for call in (
        lambda: record(there, prompts(), [Site(2, "attn_out")]),
        lambda: record(there, prompts(), [Site(2, "z")]),
        lambda: check_site(there, Site(2, "resid_mid")),
        lambda: intervened_logits(recording, Site(2), one, one, vector, path="hooks"),
        lambda: unembed(recording, recording.final_hidden[0]),
        lambda: direct_logits(recording, vector, 1.0),
        lambda: wrap(there, remote=True),
    ):
        with pytest.raises(ModelError, match=r"remotely, and this needs a pass on this machine|is wrapped already"):
            call()
    with pytest.raises(SiteError, match="no block 6"):
        record(there, prompts(), [Site(6)])


def test_models_that_cannot_run_remotely_raise(tmp_path):
    with pytest.raises(ModelError, match="a LlamaForCausalLM cannot run remotely; pass an nnsight model"):
        wrap(tiny_model("llama"), remote=True)
    with pytest.warns(UserWarning, match="which revision of .* is not known"):
        wrap(far_away(fresh("llama"), tmp_path, revision=None), remote="local")


def test_a_model_that_is_not_causal_raises(tmp_path, monkeypatch):
    model = far_away(fresh("llama"), tmp_path)
    model.dispatch()
    model._module.config._commit_hash = "c0ffee"
    mlp = model._module.model.layers[2].mlp
    monkeypatch.setattr(mlp, "forward", lambda x, own=mlp.forward: own(x) + x.mean(1, keepdim=True))
    with pytest.raises(ModelError, match="it is not causal: later tokens change earlier activations"):
        wrap(model, remote="local")


def test_saes_are_matched_to_remote_models_by_name(both):
    there = both[1]
    sae = build(named("standard:topk"), 48, 4, torch.randn(30, D_MODEL), torch.Generator().manual_seed(0))
    sae.hook_name, sae.model_name, sae.metadata["weights_sha256"] = "blocks.2.hook_resid_post", there.name, "0" * 64
    assert sae_site(sae, there) == Site(2)
    sae.model_name = "another"
    with pytest.raises(BelongingError, match="another"):
        sae_site(sae, there)
