import json
import warnings

import pytest
import torch
from safetensors.torch import save_file

from sae_models import BelongingError, CheckpointError, SAEError, as_sae, load_sae, save_sae
from sae_models.gates import Gate, JumpReLU
from sae_models.normalise import normalisation
from sae_models.sae import SAE
from sae_models.scores import Aligned, Cosine, Inner, Tied, unit_rows
from sae_models.selectors import AbsTopK, BatchTopK, ReLU, TopK
from tests.fuzz_saes import lens as lens_equation
from tests.sae_models.written import D_MODEL, D_SAE, K, assert_same, drawn, inputs

HOOK = "blocks.3.hook_resid_post"
ALL_NORMALISATIONS = ("none", "layer_norm", "constant_norm_rescale")


def tensors(architecture="standard"):
    found = {"W_enc": drawn(D_MODEL, D_SAE), "W_dec": drawn(D_SAE, D_MODEL, seed=1), "b_dec": drawn(D_MODEL, seed=2)}
    vectors = {"gated": ("b_gate", "r_mag", "b_mag"), "jumprelu": ("b_enc", "threshold")}.get(architecture, ("b_enc",))
    return found | {key: 0.3 * drawn(D_SAE, seed=seed) for seed, key in enumerate(vectors, 3)}


def config(architecture="standard", **changes):
    metadata = {"sae_lens_version": "6.54.0", "model_name": "gpt2", "hook_name": HOOK}
    plain = {"architecture": architecture, "d_in": D_MODEL, "d_sae": D_SAE, "apply_b_dec_to_input": True}
    return plain | {"metadata": metadata} | ({"k": K} if architecture == "topk" else {}) | changes


def folder(path, config, tensors):
    path.mkdir(exist_ok=True, parents=True)
    (path / "cfg.json").write_text(json.dumps(config))
    save_file({key: value.contiguous() for key, value in tensors.items()}, path / "sae_weights.safetensors")
    return path


# ---- the format, without the library ----


def test_version_6_files_give_model_and_site(tmp_path):
    sae = load_sae(folder(tmp_path, config(), tensors()))
    assert (sae.model_name, sae.hook_name) == ("gpt2", HOOK)
    assert sae.metadata["sae_lens_version"] == "6.54.0"


@pytest.mark.parametrize("normalise", ALL_NORMALISATIONS)
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
@pytest.mark.parametrize("apply", [True, False])
def test_every_combination_computes_the_formats_equation(tmp_path, architecture, normalise, apply):
    """Without SAELens itself; tests below compare with it."""
    said = config(architecture, normalize_activations=normalise, apply_b_dec_to_input=apply)
    sae = load_sae(folder(tmp_path, said, tensors(architecture)), dtype=torch.float64)
    x = inputs().reshape(-1, D_MODEL).double()
    z, expected = lens_equation(
        {key: value.double().numpy() for key, value in tensors(architecture).items()}, said, x.numpy()
    )
    torch.testing.assert_close(sae.encode(x), torch.from_numpy(z), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(sae(x), torch.from_numpy(expected), atol=1e-6, rtol=1e-6)


def test_settings_of_version_5_are_read(tmp_path):
    old = {"d_in": D_MODEL, "d_sae": D_SAE, "model_name": "gpt2-small", "hook_point": HOOK, "hook_layer": 3}
    old |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "normalize_activations": False}
    old |= {"context_size": 128, "hook_point_head_index": None, "finetuning_scaling_factor": False}
    found = tensors()
    new = load_sae(folder(tmp_path / "new", config("topk"), found))
    with_ones = found | {"scaling_factor": torch.ones(D_SAE)}
    sae = load_sae(folder(tmp_path / "old", old, with_ones))
    assert isinstance(sae.selector, TopK) and torch.equal(sae(inputs()), new(inputs()))
    assert (sae.model_name, sae.hook_name) == ("gpt2-small", HOOK)
    assert sae.metadata["context_size"] == 128


def test_settings_of_another_architecture_are_ignored(tmp_path):
    found = tensors("jumprelu")
    plain = load_sae(folder(tmp_path / "a", config("jumprelu"), found))
    stale = load_sae(folder(tmp_path / "b", config("jumprelu", rescale_acts_by_decoder_norm=True), found))
    assert torch.equal(plain.encode(inputs()), stale.encode(inputs()))


def test_norm_scaling_factor_is_needed_and_folded_in(tmp_path):
    found = tensors()
    path = folder(tmp_path, config(normalize_activations="expected_average_only_in"), found)
    with pytest.raises(CheckpointError, match=r"expected_average_only_in.*give norm_scaling_factor="):
        load_sae(path)
    sae = load_sae(path, norm_scaling_factor=0.25)
    z = torch.relu((0.25 * inputs() - found["b_dec"]) @ found["W_enc"] + found["b_enc"])
    assert_same(sae.encode(inputs()), z)
    assert_same(sae(inputs()), 4 * (z @ found["W_dec"] + found["b_dec"]))


def test_log_threshold_of_early_jumprelu_checkpoints_is_read(tmp_path):
    found = tensors("jumprelu")
    logarithm = {key: value for key, value in found.items() if key != "threshold"} | {
        "log_threshold": found["threshold"]
    }
    found["threshold"] = found["threshold"].exp()
    a = load_sae(folder(tmp_path / "a", config("jumprelu"), found))
    b = load_sae(folder(tmp_path / "b", config("jumprelu"), logarithm))
    assert torch.equal(a(inputs()), b(inputs()))


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"architecture": "temporal"}, CheckpointError, "architecture 'temporal'; expected one of standard"),
        ({"architecture": "matching_pursuit"}, CheckpointError, "architecture 'matching_pursuit'"),
        ({"architecture": "jumprelu_skip_transcoder"}, CheckpointError, "a transcoder"),
        ({"d_out": D_MODEL}, CheckpointError, "a transcoder"),
        ({"normalize_activations": "covariance_whitening"}, CheckpointError, "'covariance_whitening'; expected none"),
        ({"reshape_activations": "hook_z"}, BelongingError, r"inside attention heads \(hook_z\)"),
        ({"metadata": {"hook_name": "blocks.1.attn.hook_z"}}, BelongingError, "inside attention heads"),
        ({"metadata": {"hook_name": HOOK, "hook_head_index": 2}}, BelongingError, r"\(head 2\)"),
        ({"metadata": {"hook_name": HOOK, "hook_name_out": "blocks.3.hook_mlp_out"}}, CheckpointError, "a transcoder"),
        ({"activation_fn": "tanh-relu"}, CheckpointError, "activation_fn 'tanh-relu'"),
        ({"activation_fn": "topk", "activation_fn_kwargs": {"k": 2, "signed": True}}, CheckpointError, "signed"),
        ({"architecture": "topk"}, CheckpointError, "does not say its k"),
        ({"d_sae": D_SAE + 1}, CheckpointError, r"expected \(41, 12\) from cfg.json"),
    ],
)
def test_settings_that_cannot_be_read_exactly_are_refused(tmp_path, changes, error, says):
    with pytest.raises(error, match=says):
        load_sae(folder(tmp_path, config() | changes, tensors()))


def test_wrong_keys_are_refused(tmp_path):
    found = tensors()
    with pytest.raises(CheckpointError, match="no tensor 'b_enc' among W_dec, W_enc, b_dec"):
        load_sae(folder(tmp_path, config(), {key: value for key, value in found.items() if key != "b_enc"}))
    with pytest.raises(CheckpointError, match="threshold: not used by architecture standard"):
        load_sae(folder(tmp_path, config(), found | {"threshold": torch.zeros(D_SAE)}))
    with pytest.raises(CheckpointError, match=r"b_enc has shape \(3,\); expected \(40,\)"):
        load_sae(folder(tmp_path, config(), found | {"b_enc": torch.zeros(3)}))
    with pytest.raises(CheckpointError, match="multiplied by scaling_factor before decoding"):
        load_sae(folder(tmp_path, config(), found | {"scaling_factor": torch.full((D_SAE,), 2.0)}))


# ---- models loaded with other options ----


def planted():
    """An SAE that reconstructs exactly what has no mean: latents are the positive and negative parts along a basis."""
    basis, _ = torch.linalg.qr(torch.eye(D_MODEL) - 1 / D_MODEL)
    basis = basis[:, : D_MODEL - 1].T  # of the directions without a mean
    rows = torch.cat([basis, -basis])
    b_dec = drawn(D_MODEL, seed=2)
    return {"W_enc": rows.T, "W_dec": rows, "b_enc": torch.zeros(len(rows)), "b_dec": b_dec - b_dec.mean()}


def fve(sae, x):
    x = x.reshape(-1, x.shape[-1])
    return float(1 - (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum())


PLANTED = {"d_sae": 2 * D_MODEL - 2, "metadata": {"model_name": "gpt2", "hook_name": HOOK, "sae_lens_version": "6"}}
OFF = inputs() + torch.linspace(-3, 3, 18).reshape(2, 9, 1)
"""activations whose mean differs from token to token"""


def loaded_with(**kwargs):
    return PLANTED["metadata"] | {"model_from_pretrained_kwargs": kwargs}


def test_centred_writing_weights_are_folded_exactly(tmp_path):
    """On the model's own activations the SAE does what it did on centred ones, and the mean is added back."""
    path = folder(tmp_path, config(**PLANTED) | {"metadata": loaded_with(center_writing_weights=True)}, planted())
    sae, as_it_is = load_sae(path), load_sae(path, center_writing_weights=False)
    mean = OFF.mean(-1, keepdim=True)
    assert fve(as_it_is, OFF) < 0.9 and fve(as_it_is, OFF - mean) > 1 - 1e-9
    assert fve(sae, OFF) > 1 - 1e-9 and fve(sae, OFF - mean) > 1 - 1e-9
    assert_same(sae.encode(OFF), as_it_is.encode(OFF - mean))
    assert_same(sae(OFF), as_it_is(OFF - mean) + mean)
    assert_same(sae(OFF), sae.encode(OFF) @ sae.W_dec + sae.offset(OFF))


@pytest.mark.parametrize("normalise", [*ALL_NORMALISATIONS, "expected_average_only_in"])
@pytest.mark.parametrize("apply", [True, False])
def test_centring_comes_before_normalisation(tmp_path, normalise, apply):
    settings = {"normalize_activations": normalise, "apply_b_dec_to_input": apply}
    path = folder(tmp_path, config(**settings) | {"metadata": loaded_with(center_writing_weights=True)}, tensors())
    factor = {"norm_scaling_factor": 0.25} if normalise.startswith("expected") else {}
    sae, plain = load_sae(path, **factor), load_sae(path, center_writing_weights=False, **factor)
    mean = OFF.mean(-1, keepdim=True)
    assert_same(sae.encode(OFF), plain.encode(OFF - mean))
    assert_same(sae(OFF), plain(OFF - mean) + mean)


@pytest.mark.parametrize(
    "kwargs", [{}, {"center_writing_weights": False}, {"fold_ln": True, "center_unembed": True, "dtype": "float16"}]
)
def test_harmless_model_options_change_nothing(tmp_path, kwargs):
    path = folder(tmp_path, config() | {"metadata": loaded_with(**kwargs)}, tensors())
    plain = load_sae(folder(tmp_path / "plain", config(), tensors()))
    assert torch.equal(load_sae(path)(OFF), plain(OFF))


@pytest.mark.parametrize(
    "kwargs", [{"checkpoint_index": 3}, {"revision": "step1000"}, {"fold_ln": True, "hf_model": "x"}]
)
def test_model_options_that_change_weights_warn(tmp_path, kwargs):
    path = folder(tmp_path, config() | {"metadata": loaded_with(**kwargs)}, tensors())
    name, value = list(kwargs.items())[-1]
    with pytest.warns(UserWarning, match=rf"trained on a model loaded with {name}={value!r} .*load the model so too"):
        load_sae(path)


def test_centring_in_version_5_settings_is_read(tmp_path):
    old = {"d_in": D_MODEL, "d_sae": 2 * D_MODEL - 2, "hook_point": HOOK, "model_name": "gpt2-small"}
    said = old | {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    assert fve(load_sae(folder(tmp_path / "said", said, planted())), OFF) > 1 - 1e-9
    path = folder(tmp_path / "silent", old, planted())  # as the first published ones are
    with pytest.warns(
        UserWarning, match=r"decoder rows have mean 0, .*give center_writing_weights=True where that is so"
    ):
        assert fve(load_sae(path), OFF) < 0.9
    assert fve(load_sae(path, center_writing_weights=True), OFF) > 1 - 1e-9  # and no warning
    assert fve(load_sae(path, center_writing_weights=False), OFF) < 0.9


def test_invalid_centring_options_raise(tmp_path):
    for value in ("yes", 1, None):
        path = folder(tmp_path, config() | {"metadata": loaded_with(center_writing_weights=value)}, tensors())
        with pytest.raises(CheckpointError, match=r"center_writing_weights = .*; expected true or false"):
            load_sae(path)
    with pytest.raises(CheckpointError, match="center_writing_weights = 'yes'; expected true or false"):
        load_sae(path, center_writing_weights="yes")
    with pytest.raises(CheckpointError, match="model_from_pretrained_kwargs = 'x'; expected an object or null"):
        load_sae(folder(tmp_path, config() | {"metadata": {"model_from_pretrained_kwargs": "x"}}, tensors()))


def test_centring_is_saved_for_saelens(tmp_path):
    path = folder(tmp_path / "a", config(**PLANTED) | {"metadata": loaded_with(center_writing_weights=True)}, planted())
    sae = load_sae(path)
    again = json.loads((save_sae(sae, tmp_path / "b") / "cfg.json").read_text())
    assert again["metadata"]["model_from_pretrained_kwargs"] == {"center_writing_weights": True}
    assert again["architecture"] == "standard" and again["normalize_activations"] == "none"
    assert torch.equal(load_sae(tmp_path / "b")(OFF), sae(OFF))
    assert torch.equal(load_sae(tmp_path / "b", layout="saelens")(OFF), sae(OFF))


# ---- against the library ----


@pytest.fixture
def lens():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations of its dependencies, as it is imported
        return pytest.importorskip("sae_lens")


def original(lens, architecture, **settings):
    """A live SAE of SAELens with weights in which nothing is zero or one."""
    cls, cfg = {
        "standard": (lens.StandardSAE, lens.StandardSAEConfig),
        "topk": (lens.TopKSAE, lens.TopKSAEConfig),
        "abstopk": (lens.AbsTopKSAE, lens.AbsTopKSAEConfig),
        "jumprelu": (lens.JumpReLUSAE, lens.JumpReLUSAEConfig),
        "gated": (lens.GatedSAE, lens.GatedSAEConfig),
    }[architecture]
    metadata = lens.saes.sae.SAEMetadata(model_name="gpt2", hook_name=HOOK, context_size=64)
    sae = cls(
        cfg(d_in=D_MODEL, d_sae=D_SAE, metadata=metadata, **({"k": K} if "topk" in architecture else {}), **settings)
    )
    sae.load_state_dict(tensors(architecture))
    return sae


@pytest.mark.bridge
@pytest.mark.parametrize("normalise", ALL_NORMALISATIONS)
@pytest.mark.parametrize("architecture", ["standard", "topk", "abstopk", "jumprelu", "gated"])
def test_saelens_files_and_live_objects_compute_the_same(lens, tmp_path, architecture, normalise):
    theirs = original(
        lens, architecture, normalize_activations=normalise, apply_b_dec_to_input="topk" not in architecture
    )
    theirs.save_model(tmp_path)
    for ours in (load_sae(tmp_path), as_sae(theirs)):
        x = inputs()
        z = theirs.encode(x)
        expected = theirs.decode(z)
        assert_same(ours(x), expected)
        assert torch.equal(ours.encode(x).sign(), z.sign())
        if normalise == "none":
            assert_same(ours.encode(x), z)
        assert (ours.model_name, ours.hook_name, ours.metadata["context_size"]) == ("gpt2", HOOK, 64)


@pytest.mark.bridge
@pytest.mark.parametrize("factor", [None, 0.3])
def test_rescaled_activations_and_folded_norms_match_saelens(lens, tmp_path, factor):
    scaled = {} if factor is None else {"normalize_activations": "expected_average_only_in"}
    theirs = original(lens, "topk", rescale_acts_by_decoder_norm=True, **scaled)
    theirs.save_model(tmp_path)
    if factor is not None:
        theirs.fold_activation_norm_scaling_factor(factor)
    ours = load_sae(tmp_path, **({} if factor is None else {"norm_scaling_factor": factor}))
    assert_same(ours(inputs()), theirs(inputs()))
    assert_same(ours.encode(inputs()), theirs.encode(inputs()))


def in_training(lens, architecture, **settings):
    cls, cfg = {
        "standard": (lens.StandardTrainingSAE, lens.StandardTrainingSAEConfig),
        "topk": (lens.TopKTrainingSAE, lens.TopKTrainingSAEConfig),
        "abstopk": (lens.AbsTopKTrainingSAE, lens.AbsTopKTrainingSAEConfig),
        "jumprelu": (lens.JumpReLUTrainingSAE, lens.JumpReLUTrainingSAEConfig),
        "gated": (lens.GatedTrainingSAE, lens.GatedTrainingSAEConfig),
        "batchtopk": (lens.BatchTopKTrainingSAE, lens.BatchTopKTrainingSAEConfig),
        "matryoshka_batchtopk": (lens.MatryoshkaBatchTopKTrainingSAE, lens.MatryoshkaBatchTopKTrainingSAEConfig),
    }[architecture]
    if "topk" in architecture:
        settings["k"] = K
    if architecture.startswith("matryoshka"):
        settings["matryoshka_widths"] = [10, D_SAE]
    sae = cls(cfg(d_in=D_MODEL, d_sae=D_SAE, **settings))
    weights = tensors("jumprelu" if architecture == "jumprelu" else architecture)
    weights |= {"topk_threshold": torch.tensor(1.5)} if "batchtopk" in architecture else {}
    weights |= {"threshold": weights["threshold"].abs()} if architecture == "jumprelu" else {}
    sae.load_state_dict(weights)
    return sae


@pytest.mark.bridge
@pytest.mark.parametrize(
    ("architecture", "settings"),
    [(name, {}) for name in ("standard", "topk", "abstopk", "jumprelu", "gated", "batchtopk", "matryoshka_batchtopk")]
    + [
        (name, {"rescale_acts_by_decoder_norm": False})
        for name in ("topk", "abstopk", "batchtopk", "matryoshka_batchtopk")
    ],
)
def test_training_sae_matches_its_inference_save(lens, tmp_path, architecture, settings):
    theirs = in_training(lens, architecture, **settings)
    theirs.save_inference_model(tmp_path / "inference")
    theirs.save_model(tmp_path / "training")
    final = lens.SAE.load_from_disk(tmp_path / "inference")
    for ours in (load_sae(tmp_path / "inference"), load_sae(tmp_path / "training"), as_sae(theirs)):
        assert_same(ours(inputs()), final(inputs()))
        assert_same(ours.encode(inputs()), final.encode(inputs()))
    assert isinstance(as_sae(theirs).selector, BatchTopK) == ("batchtopk" in architecture)


@pytest.mark.bridge
def test_saelens_transcoder_is_refused(lens, tmp_path):
    transcoder = lens.Transcoder(lens.TranscoderConfig(d_in=D_MODEL, d_sae=D_SAE, apply_b_dec_to_input=False))
    transcoder.save_model(tmp_path)
    for way in (lambda: load_sae(tmp_path), lambda: as_sae(transcoder)):
        with pytest.raises(CheckpointError, match="a transcoder"):
            way()


@pytest.mark.bridge
@pytest.mark.parametrize("architecture", ["TemporalSAE", "MatchingPursuitSAE"])
def test_other_architectures_of_saelens_are_refused(lens, architecture):
    from sae_lens.saes import matching_pursuit_sae, temporal_sae

    home = next(module for module in (matching_pursuit_sae, temporal_sae) if hasattr(module, architecture))
    cfg = getattr(home, architecture + "Config")(d_in=D_MODEL, d_sae=512)
    with pytest.raises(CheckpointError, match=f"architecture '{cfg.architecture()}'"):
        as_sae(getattr(home, architecture)(cfg))


OURS = {
    "relu": lambda: ReLU(),
    "topk": lambda: TopK(K),
    "abstopk": lambda: AbsTopK(K),
    "batchtopk": lambda: BatchTopK(K, 1.5),
    "jumprelu": lambda: JumpReLU(drawn(D_SAE, seed=7).abs()),
    "gated": lambda: Gate(*(0.3 * drawn(D_SAE, seed=seed) for seed in (7, 8, 9))),
}


def ours_of(selector, score="inner", **settings):
    W_enc, b_enc = drawn(D_SAE, D_MODEL), 0.3 * drawn(D_SAE, seed=1)
    scores = {
        "inner": lambda: Inner(W_enc, None if selector == "gated" else b_enc),
        "aligned": lambda: Aligned(W_enc, b_enc),
        "tied": lambda: Tied(b_enc),
        "cosine": lambda: Cosine(W_enc, b_enc, torch.ones(1), torch.zeros(1)),
    }
    W_dec, b_dec = drawn(D_SAE, D_MODEL, seed=2), drawn(D_MODEL, seed=3)
    belongs = {"model_name": "owner/gpt2", "hook_name": HOOK, "metadata": {"seed": 1}}
    return SAE(scores[score](), OURS[selector](), unit_rows(W_dec), b_dec, **belongs, **settings)


@pytest.mark.bridge
@pytest.mark.parametrize("subtract_b_dec", [True, False])
@pytest.mark.parametrize("normalise", ["none", "layer_norm", "constant_norm"])
@pytest.mark.parametrize(
    ("selector", "score"), [*((name, "inner") for name in OURS), ("batchtopk", "aligned"), ("topk", "tied")]
)
def test_saelens_loads_what_we_save(lens, tmp_path, selector, score, normalise, subtract_b_dec):
    ours = ours_of(selector, score, normalise=normalisation(normalise), subtract_b_dec=subtract_b_dec)
    save_sae(ours, tmp_path)
    theirs = lens.SAE.load_from_disk(tmp_path)
    assert_same(theirs(inputs()), ours(inputs()))
    assert torch.equal(theirs.encode(inputs()).sign(), ours.encode(inputs()).sign())
    assert (theirs.cfg.metadata.model_name, theirs.cfg.metadata.hook_name) == ("owner/gpt2", HOOK)
    assert torch.equal(load_sae(tmp_path)(inputs()), ours(inputs()))


@pytest.mark.bridge
def test_saelens_refuses_cosine_saes_by_name(lens, tmp_path):
    save_sae(ours_of("topk", "cosine"), tmp_path)
    with pytest.raises(KeyError, match="mechdiag:cosine"):
        lens.SAE.load_from_disk(tmp_path)


@pytest.mark.bridge
def test_our_folder_saved_again_by_saelens_loads(lens, tmp_path):
    ours = ours_of("batchtopk")
    theirs = lens.SAE.load_from_disk(save_sae(ours, tmp_path / "a"))
    theirs.save_model(tmp_path / "b")
    assert torch.equal(load_sae(tmp_path / "b")(inputs()), ours(inputs()))
    theirs.W_dec.data *= torch.linspace(0.5, 2, D_SAE)[:, None]
    theirs.fold_W_dec_norm()
    theirs.save_model(tmp_path / "c")
    with pytest.raises(SAEError, match="thresholds that differ"):
        load_sae(tmp_path / "c")
