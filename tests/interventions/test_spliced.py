"""The residual stream of every token passed through edits, against full forward passes; and which model an SAE belongs to."""

import copy
import functools
import json
import warnings

import jaxtyping
import pytest
import torch
from safetensors.torch import save_file

from interventions import EditError, MechdiagError, ReplayError, Site, SiteError, record, wrap
from interventions import edits as edit
from interventions import spliced as module
from interventions.cache import cache_folder
from interventions.models.loading import layernorm_counterpart
from interventions.provenance import model_provenance
from interventions.spliced import spliced
from sae_models import load_sae
from sae_models.architectures import build, named
from sae_models.belonging import sae_site
from sae_models.edits import reconstruct, zero_latents
from sae_models.errors import BelongingError, SAEError
from tests.tiny import (
    D_MODEL,
    HOOKED,
    N_LAYERS,
    REPLAYED,
    TOLERANCE,
    VARIANTS,
    VOCAB,
    assert_same_effect,
    bridge,
    changed_in,
    exact_kl,
    fresh,
    points,
    points_by_turns,
    prompts,
    tiny_model,
    traced,
)

SITE = Site(2)
PROMPTS = prompts((24, 10, 17, 1))
"""beyond a window, padded, one token"""


def random_sae(x=None, **where):
    """With ReLU: which of two nearly equal latents TopK keeps may depend on the last bit of x."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, D_MODEL, generator=generator) if x is None else x.reshape(-1, D_MODEL)
    sae = build(named("standard:relu"), 64, 6, x, generator, **where).requires_grad_(False)
    for weight in sae.parameters():
        weight.add_(0.2 * torch.randn(weight.shape, generator=generator).to(weight))
    return sae


def edits_at(recording, site):
    """The edits of an evaluation: reconstruction, one latent removed, zero and mean ablation."""
    x = recording.activations[site]
    sae = random_sae(x)
    over = torch.cat([x[i, :n] for i, n in enumerate(recording.length.tolist())])
    return {
        "reconstruct": lambda x: reconstruct(x, sae),
        "one latent": lambda x: zero_latents(x, sae, 3),
        "zero": edit.zero,
        "mean": lambda x: edit.mean(x, over),
    }


@torch.no_grad()
def alone(name, hf, site, change, tokens=PROMPTS, where=None):
    """Logits `[pos, vocab]` of each prompt alone under a hook that is set here; without a change the clean logits."""
    found = []
    for i, ids in enumerate(tokens):
        at = torch.ones(len(ids), dtype=torch.bool) if where is None else where[i, : len(ids)]

        def put(hidden, at=at):
            hidden = hidden.clone()
            hidden[0, at] = change(hidden[0, at])
            return hidden

        remove = changed_in(name, hf, site, put) if change is not None and at.any() else lambda: None
        found.append(hf(input_ids=torch.tensor([ids], device=next(hf.parameters()).device)).logits[0])
        remove()
    return found


@functools.cache
def clean_logits(name, hf):
    return alone(name, hf, SITE, None)


def assert_exact(result, name, hf, site, edits, tokens=PROMPTS, where=None):
    clean = clean_logits(name, hf) if tokens is PROMPTS else alone(name, hf, site, None, tokens)
    for what, change in edits.items():
        logits = alone(name, hf, site, change, tokens, where)
        for i, (p, q) in enumerate(zip(clean, logits, strict=True)):
            n = len(tokens[i])
            assert_same_effect(result.kl[what][i, :n], exact_kl(p, q), TOLERANCE)
            following = torch.tensor(tokens[i][1:], dtype=torch.long)[:, None]
            for found, own in ((result.loss[what], q), (result.clean_loss, p)):
                loss = -own.double().cpu().log_softmax(-1)[:-1].gather(1, following)[:, 0]
                assert torch.allclose(found[i, : n - 1].double(), loss, atol=2 * TOLERANCE, rtol=0)
                assert found[i, n - 1 :].isnan().all()
            assert result.kl[what][i, n:].isnan().all()
        assert result.n_nonfinite[what] == 0


# Exactness


CASES = [(name, Site(2, point)) for name, point in points_by_turns(*REPLAYED, *HOOKED, *VARIANTS)]
CASES += [("llama", Site(layer, point)) for layer in (0, N_LAYERS - 1) for point in points("llama")]


@pytest.mark.parametrize(("name", "site"), CASES, ids=str)
def test_blocks_above_match_full_forward_passes(name, site, device):
    """Also on architectures that replay does not support."""
    hf = tiny_model(name, device)
    recording = record(hf, PROMPTS, [site], keep_cache=False)
    edits = edits_at(recording, site)
    if name not in ("llama", "gpt2"):
        edits = {"reconstruct": edits["reconstruct"]}
    elif site.point == "resid_mid":
        del edits["zero"]  # rounding of the block's own sum remains there, and the next norm magnifies it
    result = spliced(recording, site, edits)
    assert (result.path, result.why_hooks) == ("blocks", None) and 0 <= result.delta <= TOLERANCE
    assert list(result.kl) == list(result.loss) == list(edits)
    assert float(result.kl["reconstruct"].nanmean()) > 1e-3
    assert_exact(result, name, hf, site, edits)


@pytest.mark.parametrize("path", ["blocks", "hooks"])
@pytest.mark.parametrize("wrapper", [pytest.param("bridge", marks=pytest.mark.bridge), "nnsight", "none"])
@pytest.mark.parametrize(("name", "site"), [("gpt2", Site(3, "mlp_out")), ("gemma2", Site(1, "attn_out"))], ids=str)
def test_wrappers_and_paths_match_full_forward_passes(name, site, wrapper, path, device):
    hf = fresh(name, device)
    model = bridge(name, hf) if wrapper == "bridge" else traced(hf) if wrapper == "nnsight" else hf
    recording = record(model, PROMPTS, [site], keep_cache=False)
    edits = edits_at(recording, site)
    result = spliced(recording, site, edits, path=path)
    assert result.path == path and result.why_hooks is None and (result.delta != result.delta) is (path == "hooks")
    assert_exact(result, name, tiny_model(name, device), site, edits)


@pytest.mark.parametrize("path", ["blocks", "hooks"])
@pytest.mark.parametrize("site", [SITE, Site(2, "mlp_out")], ids=str)
def test_only_chosen_tokens_are_edited(site, path, device):
    """Effects are read at all tokens."""
    hf = tiny_model("llama", device)
    recording = record(hf, PROMPTS, [site], keep_cache=False)
    where = torch.rand(recording.tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.7
    where[:, 0] = False  # nothing at all in the prompt of one token
    edits = {"zero": edit.zero}
    result = spliced(recording, site, edits, where=where, path=path, batch_tokens=1)
    assert_exact(result, "llama", hf, site, edits, where=where)
    assert (result.kl["zero"][:, 0] < 1e-9).all() and result.kl["zero"][0, 1:].max() > 1e-3


def test_identity_edit_has_zero_kl(device):
    recording = record(tiny_model("llama", device), PROMPTS, [SITE], keep_cache=False, batch_prompts=1)
    result = spliced(recording, SITE, {"same": lambda x: x})
    real = ~result.kl["same"].isnan()
    assert result.kl["same"][real].max() < 1e-9
    assert torch.allclose(result.loss["same"], result.clean_loss, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("path", ["blocks", "hooks"])
def test_results_do_not_depend_on_batches_and_other_edits(path, device):
    recording = record(tiny_model("gpt2", device), PROMPTS, [SITE], keep_cache=False)
    edits = edits_at(recording, SITE)
    together = spliced(recording, SITE, edits, path=path)
    for batch_tokens in (1, 30):
        done = []
        how = {"path": path, "batch_tokens": batch_tokens, "progress": done.append}
        found = spliced(recording, SITE, {"zero": edit.zero}, **how)
        assert sum(done) == len(PROMPTS) and (len(done) == len(PROMPTS)) == (batch_tokens == 1)
        real = ~found.kl["zero"].isnan()
        assert_same_effect(found.kl["zero"][real], together.kl["zero"][real], 1e-5)
        assert torch.allclose(found.loss["zero"], together.loss["zero"], atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("path", ["blocks", "hooks"])
def test_results_do_not_depend_on_the_size_of_chunks(path, monkeypatch, device):
    """Logits of ten tokens at a time, of which three are compared at a time."""
    for name, tokens in (("LOGITS", 10), ("LOGITS_GPU", 10), ("COMPARED", 3)):
        monkeypatch.setattr(module, name, tokens * VOCAB)
    hf = tiny_model("llama", device)
    recording = record(hf, PROMPTS, [SITE], keep_cache=False)
    edits = edits_at(recording, SITE)
    assert_exact(spliced(recording, SITE, edits, path=path), "llama", hf, SITE, edits)


def test_edits_get_each_token_once_and_no_padding(device):
    recording = record(tiny_model("llama", device), PROMPTS, [SITE], keep_cache=False)
    seen = []

    def look(x):
        seen.append(x.clone())
        return 0.9 * x

    spliced(recording, SITE, {"look": look})
    assert sum(len(x) for x in seen) == int(recording.length.sum())
    x = recording.activations[SITE]
    own = torch.cat([x[i, :n] for i, n in enumerate(recording.length.tolist())])
    assert torch.equal(torch.cat(seen).sort(dim=0).values, own.sort(dim=0).values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_bfloat16_and_float64_agree_with_float32(dtype, device):
    recording = record(fresh("llama", device, dtype), PROMPTS, [SITE], keep_cache=False)
    result = spliced(recording, SITE, {"zero": edit.zero})
    wide = spliced(record(tiny_model("llama", device), PROMPTS, [SITE], keep_cache=False), SITE, {"zero": edit.zero})
    assert result.path == "blocks"
    assert result.kl["zero"].dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    off = (result.loss["zero"] - wide.loss["zero"]).nan_to_num(0).abs().max()
    assert off < (0.2 if dtype == torch.bfloat16 else 1e-4)


# Errors


def test_falls_back_to_hooks_where_blocks_differ(monkeypatch, device):
    hf = tiny_model("llama", device)
    recording = record(hf, PROMPTS, [SITE], keep_cache=False)
    real = module.entering_at
    monkeypatch.setattr(module, "entering_at", lambda recording, first, value: real(recording, first, 1.001 * value))
    with pytest.warns(
        UserWarning, match=r"the blocks above 2.resid_post alone .*: logits differ by .*; these are used"
    ):
        result = spliced(recording, SITE, {"zero": edit.zero, "half": lambda x: x / 2})
    assert result.path == "hooks" and "logits differ" in str(result.why_hooks) and result.delta > TOLERANCE
    assert_exact(result, "llama", hf, SITE, {"half": lambda x: x / 2})
    with pytest.raises(ReplayError, match="use path='auto' or 'hooks'"):
        spliced(recording, SITE, {"zero": edit.zero}, path="blocks")


def test_falls_back_to_hooks_where_blocks_raise(monkeypatch, device):
    recording = record(tiny_model("llama", device), PROMPTS, [SITE], keep_cache=False)

    def fail(*_):
        raise TypeError("no stream here\nat all")

    monkeypatch.setattr(module, "entering_at", fail)
    with pytest.warns(UserWarning, match="TypeError: no stream here; these"):
        assert spliced(recording, SITE, {"zero": edit.zero}).path == "hooks"


@pytest.mark.parametrize("path", ["blocks", "hooks"])
def test_nonfinite_values_are_counted_and_stay_in_their_prompt(path, device):
    recording = record(tiny_model("llama", device), PROMPTS, [SITE], keep_cache=False)
    bad = recording.activations[SITE][1, 4]
    edits = {
        "half": lambda x: x / 2,
        "bad": lambda x: torch.where((x == bad).all(-1, keepdim=True), torch.nan, x / 2),
    }
    result = spliced(recording, SITE, edits, path=path)
    assert result.n_nonfinite["half"] == 0 and 6 <= result.n_nonfinite["bad"] <= 10
    rest = torch.tensor([0, 2, 3])
    for kind in (result.kl, result.loss):
        assert torch.allclose(kind["bad"][rest], kind["half"][rest], atol=1e-6, equal_nan=True)


@pytest.fixture
def unchecked_shapes():
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.mark.parametrize(
    ("site", "edits", "options", "error", "message"),
    [
        (SITE, {}, {}, EditError, "no edits"),
        (SITE, {"cut": lambda x: x[:, 1:]}, {}, EditError, r"edit 'cut' gave shape \[\d+, 31\]; expected \[\d+, 32\]"),
        (Site(3), {"zero": edit.zero}, {}, SiteError, "site 3.resid_post was not recorded; recorded: 2.resid_post"),
        (Site(3, "mlp_out"), {"zero": edit.zero}, {}, SiteError, "site 3.resid_pre was not recorded"),
        (Site(9), {"zero": edit.zero}, {}, SiteError, "no block 9"),
        (SITE, {"zero": edit.zero}, {"path": "fast"}, MechdiagError, "path 'fast'"),
        (SITE, {"zero": edit.zero}, {"batch_tokens": 0}, MechdiagError, "batch_tokens 0"),
        (SITE, {"zero": edit.zero}, {"where": torch.ones(4, 3, dtype=torch.bool)}, EditError, r"expected truth values \[4, 24\]"),
        (SITE, {"zero": edit.zero}, {"where": torch.ones(4, 24)}, EditError, "where of dtype torch.float32"),
        (SITE, {"zero": edit.zero}, {"where": torch.zeros(4, 24, dtype=torch.bool)}, EditError, "leaves no token"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_invalid_arguments_raise(site, edits, options, error, message, unchecked_shapes, device):
    recording = record(tiny_model("llama", device), PROMPTS, [SITE], keep_cache=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(error, match=message):
            spliced(recording, site, edits, **options)


# Which model an SAE belongs to


@functools.cache
def named_model(name="tiny", architecture="llama"):
    return wrap(fresh(architecture), name=name)


def belonging(model_name="tiny", hook_name="blocks.2.hook_resid_post", **metadata):
    sae = random_sae(model_name=model_name, hook_name=hook_name)
    sae.metadata.update(metadata)
    return sae


@pytest.mark.parametrize("point", ["resid_pre", "resid_post", "attn_out", "mlp_out", "resid_mid"])
def test_the_site_is_read_from_the_hook_name(point):
    assert sae_site(belonging(hook_name=f"blocks.3.hook_{point}"), named_model()) == Site(3, point)


@pytest.mark.parametrize(
    ("hook_name", "architecture", "message"),
    [
        (
            "blocks.3.attn.hook_z",
            "llama",
            "'blocks.3.attn.hook_z', which is no site of SAEs here; known: blocks.N.hook_resid_pre",
        ),
        ("blocks.3.ln2.hook_normalized", "llama", "no site of SAEs here"),
        ("blocks.3.mlp.hook_post", "llama", "no site of SAEs here"),
        ("hook_embed", "llama", "no site of SAEs here"),
        ("blocks.12.hook_resid_post", "llama", "no block 12 in a model of 6 blocks"),
        ("blocks.2.hook_resid_mid", "phi", "no resid_mid in block 2"),
    ],
)
def test_unknown_sites_raise(hook_name, architecture, message):
    with pytest.raises(SiteError, match=message):
        sae_site(belonging(hook_name=hook_name), named_model(architecture=architecture))


def test_missing_or_mismatched_sites_and_widths_raise():
    sae = belonging()
    narrow = build(named("standard:topk"), 8, 2, torch.randn(9, 5), torch.Generator().manual_seed(0))
    narrow.hook_name = sae.hook_name
    cases = [
        (belonging(hook_name=None), None, r"does not say where it belongs; set sae.hook_name"),
        (narrow, None, "an SAE of width 5 for activations of width 32"),
    ]
    for other in (Site(3), Site(2, "resid_pre")):
        cases.append((sae, other, f"an SAE of site 'blocks.2.hook_resid_post' put to site '{other.hook_name}'"))
    for one, site, message in cases:
        with pytest.raises(BelongingError, match=message):
            sae_site(one, named_model(), site)
    assert sae_site(sae, named_model(), SITE) == SITE


def test_without_hashes_models_are_compared_by_name():
    for own in ("tiny", "Owner/Tiny", None):
        assert sae_site(belonging(own), named_model()) == SITE
    assert sae_site(belonging("tiny"), named_model("owner/TINY")) == SITE
    assert sae_site(belonging("gpt2-small"), named_model("openai-community/gpt2")) == SITE
    with pytest.raises(BelongingError, match="an SAE of model 'other' put to model 'tiny'"):
        sae_site(belonging("other"), named_model())


def test_packaged_model_is_recognised_by_its_folder():
    own = belonging("smollm2-135m")
    assert sae_site(own, named_model(str(cache_folder() / "smollm2-135m-93000000"))) == SITE
    for folder in ("/elsewhere/smollm2-135m-93000000", str(cache_folder() / "other")):
        with pytest.raises(BelongingError, match=r"an SAE of model 'smollm2-135m' put to model"):
            sae_site(own, named_model(folder))


def test_hashes_of_weights_take_precedence_over_names():
    own, other = named_model("tiny"), wrap(fresh("qwen3"), name="tiny")
    sae = belonging("another name", weights_sha256=own.weights_hash)
    assert sae_site(sae, own) == SITE
    with pytest.raises(BelongingError) as caught:
        sae_site(belonging("tiny", weights_sha256=own.weights_hash), other)
    assert own.weights_hash[:12] in str(caught.value) and other.weights_hash[:12] in str(caught.value)


def test_a_layernorm_counterpart_accepts_the_saes_of_its_model():
    """By hash and by name; its provenance says what it is."""
    model = named_model()
    found = layernorm_counterpart(model)
    for sae in (belonging("any", weights_sha256=model.weights_hash), belonging("owner/Tiny"), belonging(found.name)):
        assert sae_site(sae, found) == SITE
    assert sae_site(belonging("any", weights_sha256=found.weights_hash), found) == SITE
    for sae, other in (
        (belonging("tiny", weights_sha256="0" * 64), found),
        (belonging("other"), found),
        (belonging(found.name), model),
        (belonging("tiny"), named_model(found.name)),  # no more than a name
        (belonging("tiny", weights_sha256=found.weights_hash), model),
    ):
        with pytest.raises(BelongingError):
            sae_site(sae, other)
    assert "not a model trained with LayerNorm" in model_provenance(found)["model_note"]


@pytest.mark.parametrize("wrapper", [pytest.param("bridge", marks=pytest.mark.bridge), "nnsight"])
@pytest.mark.parametrize("known", [True, False])
def test_wrapped_models_are_matched_to_saes(wrapper, known):
    plain = wrap(fresh("llama"))
    hashes = {"weights_sha256": plain.weights_hash} if known else {}
    model = bridge("llama", plain.hf) if wrapper == "bridge" else traced(plain.hf)
    assert sae_site(belonging(plain.name, **hashes), model) == SITE
    with pytest.raises(BelongingError):
        sae_site(belonging("other", **({"weights_sha256": "0" * 64} if known else {})), model)


# Models whose writing weights were centred


def without_means(hf):
    """GPT-2 with centred writing weights, as TransformerLens does it: all that is added to the residual stream has mean 0."""
    model = copy.deepcopy(hf)
    with torch.no_grad():
        for table in (model.transformer.wte, model.transformer.wpe):
            table.weight -= table.weight.mean(dim=1, keepdim=True)
        for block in model.transformer.h:
            for out in (block.attn.c_proj, block.mlp.c_proj):
                out.weight -= out.weight.mean(dim=1, keepdim=True)
                out.bias -= out.bias.mean()
    return model


def planted_on_centred(folder, hook_name):
    """A SAELens folder of an SAE that reconstructs vectors of mean 0 exactly."""
    basis, _ = torch.linalg.qr(torch.eye(D_MODEL) - 1 / D_MODEL)
    rows = torch.cat([basis[:, : D_MODEL - 1].T, -basis[:, : D_MODEL - 1].T])
    tensors = {
        "W_enc": rows.T.contiguous(),
        "W_dec": rows,
        "b_enc": torch.zeros(len(rows)),
        "b_dec": torch.zeros(D_MODEL),
    }
    metadata = {"hook_name": hook_name, "model_from_pretrained_kwargs": {"center_writing_weights": True}}
    save_file(tensors, folder / "sae_weights.safetensors")
    config = {"architecture": "standard", "d_in": D_MODEL, "d_sae": len(rows), "metadata": metadata}
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("point", ["resid_post", "attn_out", "mlp_out"])
def test_saes_of_centred_activations_are_exact_on_the_original(point, tmp_path):
    hf = copy.deepcopy(fresh("gpt2"))
    with torch.no_grad():  # a large mean of the residual stream, which differs between tokens
        hf.transformer.wpe.weight += torch.linspace(-2, 2, len(hf.transformer.wpe.weight))[:, None]
        for block in hf.transformer.h:
            block.attn.c_proj.weight += 0.5
            block.mlp.c_proj.weight += 0.5
    site = Site(2, point)
    recorded = record(hf, PROMPTS, [site])
    x, centred = recorded.activations[site], record(without_means(hf), PROMPTS, [site]).activations[site]
    real = torch.arange(x.shape[1]) < recorded.length[:, None]
    x, centred = x[real], centred[real]
    assert torch.allclose(x - x.mean(-1, keepdim=True), centred, atol=1e-4)
    assert x.mean(-1).std() > 0.2
    path = planted_on_centred(tmp_path, site.hook_name)
    sae, as_it_is = load_sae(path), load_sae(path, center_writing_weights=False)
    assert sae_site(sae, hf) == site

    def fve(one, x):
        return float(1 - (x - one(x)).square().sum() / (x - x.mean(0)).square().sum())

    assert fve(as_it_is, centred) > 1 - 1e-6 and fve(sae, x) > 1 - 1e-6
    assert fve(as_it_is, x) < 0.9
    assert torch.allclose(sae.encode(x), as_it_is.encode(centred), atol=1e-4)
    found = spliced(recorded, site, {"x̂": lambda x: reconstruct(x, sae)}, path="blocks")
    assert found.kl["x̂"].nan_to_num().max() < 1e-6


@pytest.mark.bridge
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama"])
def test_transformer_lens_centres_only_layernorm_models(name):
    """Each site becomes x − mean(x) under LayerNorm and stays x under RMSNorm; other foldings leave x unchanged."""
    tokens = torch.tensor(PROMPTS[:1])
    stays = {"fold_ln": True, "center_unembed": True, "fold_value_biases": True, "center_writing_weights": False}
    centres = dict.fromkeys(stays, False) | {"center_writing_weights": True}
    found = []
    for settings in (None, stays, centres):
        hf = copy.deepcopy(fresh(name))
        handle = bridge(name, hf)
        if settings is not None:
            handle.enable_compatibility_mode(**settings, disable_warnings=True)
        found.append(handle.run_with_cache(tokens)[1])
    plain, same, centred = found
    for point in ("hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out"):
        x = plain[f"blocks.2.{point}"]
        expected = x - x.mean(-1, keepdim=True) if name != "llama" else x
        assert torch.allclose(same[f"blocks.2.{point}"], x, atol=TOLERANCE)
        assert torch.allclose(centred[f"blocks.2.{point}"], expected, atol=TOLERANCE), point


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("llama", "RMSNorm"),
        ("bloom", "LayerNorm behind its embeddings"),
        ("opt_post_norm", "LayerNorm behind its blocks"),
    ],
)
def test_saes_of_centred_activations_raise_if_the_mean_matters(name, why, tmp_path):
    """TransformerLens does not centre the writing weights of such models, whatever the settings say."""
    path = planted_on_centred(tmp_path, SITE.hook_name)
    with pytest.raises(BelongingError, match=rf"which has {why}: .*load the SAE with center_writing_weights=False"):
        sae_site(load_sae(path), fresh(name))
    assert sae_site(load_sae(path, center_writing_weights=False), fresh(name)) == SITE


def test_damaged_saes_raise():
    sae = random_sae(hook_name=SITE.hook_name)
    sae.metadata["weights_sha256"] = 3
    with pytest.raises(BelongingError, match="weights_sha256 is a int; expected a text"):
        sae_site(sae, fresh("llama"))
    for value in (torch.nan, torch.inf):
        sae = random_sae(hook_name=SITE.hook_name)
        sae.b_dec[3] = value
        with pytest.raises(SAEError, match="b_dec of an SAE holds 1 values that are nan or infinite"):
            sae_site(sae, fresh("llama"))
