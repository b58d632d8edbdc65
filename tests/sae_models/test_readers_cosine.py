"""Checkpoints of arXiv:2606.15054: variants recognised by keys and shapes; their equations are asserted in test_readers."""

import pytest
import torch

from sae_models import CheckpointError, SAEError, load_sae, save_sae
from sae_models.selectors import BatchTopK
from tests.fuzz_saes import BYPASS, D_SAE, FORMATS, K, X, alike, bypass, computed, loaded, paper, read, write

STANDARD = FORMATS["cosine standard"].tensors
GLOBAL = FORMATS["cosine global"].tensors
PER_LATENT = torch.linspace(0, 1, D_SAE)


def written(folder, weights, name="adaptive_L27_final.pt"):
    folder.mkdir(exist_ok=True)
    write(folder, name, weights)
    return folder / name


def without(weights, *keys):
    return {key: value for key, value in weights.items() if key not in keys}


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("cosine standard", "standard"), ("cosine global", "cosine-global"), ("cosine groups", "cosine-group3"),
        ("cosine feature", "cosine-feature"), ("cosine delta", "cosine-delta"), ("cosine pure", "cosine-pure"),
        ("cosine bypass", "bypass"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("file", ["final.pt", "final.safetensors"])
def test_variant_is_recognised_by_keys_and_shapes(tmp_path, name, variant, file):
    belongs = {"model_name": "Qwen/Qwen3-8B", "hook_name": "blocks.27.hook_resid_post"}
    sae = load_sae(
        written(tmp_path, FORMATS[name].tensors, file), dtype=torch.float64, **FORMATS[name].options, **belongs
    )
    assert sae.metadata["variant"] == variant
    assert alike(computed(sae), paper(read(tmp_path, file), {}, X))
    assert {"model_name": sae.model_name, "hook_name": sae.hook_name} == belongs
    again = loaded(save_sae(sae, tmp_path / "saved"), {})
    assert alike(computed(again), computed(sae))


def test_k_is_kept_and_needed_without_a_threshold(tmp_path):
    sae = loaded(written(tmp_path, GLOBAL), {"k": K})
    assert isinstance(sae.selector, BatchTopK) and sae.selector.k == K
    assert alike(computed(sae), paper(read(tmp_path, "adaptive_L27_final.pt"), {}, X))
    path = written(tmp_path, without(GLOBAL, "threshold"))
    with pytest.raises(CheckpointError, match=r"no threshold in the file.*give k="):
        load_sae(path)
    assert alike(computed(loaded(path, {"k": K})), paper(read(tmp_path, path.name), {}, X))


@pytest.mark.parametrize(
    ("variant", "switches"),
    [
        ("bypass-free-encoder", {"unit_encoder": False}),
        ("bypass-free-decoder", {"unit_decoder": False}),
        ("bypass-free-both", {"unit_encoder": False, "unit_decoder": False}),
        ("bypass-no-restore", {"restore": False}),
        ("bypass-free-encoder-no-restore", {"unit_encoder": False, "restore": False}),
        ("bypass-free-both-no-restore", {"unit_encoder": False, "unit_decoder": False, "restore": False}),
    ],
)
def test_bypass_switches_are_options(tmp_path, variant, switches):
    rows = torch.linspace(0.6, 1.5, D_SAE)[:, None]
    path = written(tmp_path, BYPASS | {"W_enc": BYPASS["W_enc"] * rows, "W_dec": BYPASS["W_dec"] * rows.flip(0)})
    _, expected = bypass(read(tmp_path, path.name), X, **switches)
    assert alike(computed(loaded(path, {"variant": variant}))[1:], (expected,))
    with pytest.raises(CheckpointError, match=r"rows of W_enc have norms from 0.6 to 1.5; expected 1.*give variant="):
        load_sae(path)


@pytest.mark.parametrize("columns", [(), ("W_enc",), ("W_dec",), ("W_enc", "W_dec")], ids=str)
def test_orientation_of_matrices_is_read_from_their_shape(tmp_path, columns):
    """A plain file: the length of `b_dec` gives d_model. Latents equal the formula written out here."""
    turned = {key: STANDARD[key].T.contiguous() for key in columns}
    sae = loaded(written(tmp_path, STANDARD | turned, "plain.safetensors"), {})
    w = {key: value.double().numpy() for key, value in STANDARD.items()}
    s = (X - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]
    z = s * (s > w["threshold"])
    assert alike(computed(sae), (z, z @ w["W_dec"] + w["b_dec"]))
    with pytest.raises(CheckpointError, match=r"transposed = .* was given, and W_enc has shape"):
        loaded(tmp_path / "plain.safetensors", {"transposed": "W_enc" not in columns})


def test_square_matrices_need_the_option_transposed(tmp_path):
    n = STANDARD["W_enc"].shape[1]
    square = {key: value[:n] if key != "threshold" else value for key, value in STANDARD.items()}
    path = written(tmp_path, square, "plain.safetensors")
    with pytest.raises(CheckpointError, match=r"square .* give transposed=False .* or transposed=True"):
        loaded(path, {})
    rows, columns = (loaded(path, {"transposed": t}).encoder_rows() for t in (False, True))
    assert torch.equal(rows, columns.T) and torch.equal(rows, square["W_enc"].double())


def test_plain_relu_and_jumprelu_files_are_read(tmp_path):
    w = {key: value.double() for key, value in STANDARD.items() if key != "threshold"}
    path = written(tmp_path, w, "plain.safetensors")
    with pytest.raises(CheckpointError, match=r"give activation='relu'.*give k="):
        loaded(path, {})
    s = X @ w["W_enc"].numpy().T + w["b_enc"].numpy()
    plain = loaded(path, {"activation": "relu", "subtract_b_dec": False})
    assert alike(computed(plain)[:1], (s.clip(min=0),))
    written(tmp_path, w | {"threshold": PER_LATENT}, "plain.safetensors")
    assert alike(computed(loaded(path, {"subtract_b_dec": False}))[:1], (s * (s > PER_LATENT.numpy()),))


ONE_EXPONENT = GLOBAL | {"scale_b": PER_LATENT}


@pytest.mark.parametrize(
    ("weights", "options", "error", "says"),
    [
        (GLOBAL | {"threshold": torch.tensor(-1.0)}, {}, CheckpointError, r"threshold = -1\.0: saved before it was learned"),
        (ONE_EXPONENT, {}, CheckpointError, r"one exponent beside one b a latent.*variant='cosine-global'"),
        (GLOBAL, {"variant": "cosine-pure"}, CheckpointError, "variant 'cosine-pure' was given, and keys and shapes say 'cosine-global'"),
        (BYPASS, {"variant": "standard"}, CheckpointError, "variant 'standard' was given, and without b_enc this is a magnitude bypass"),
        (BYPASS, {"variant": "bypas"}, SAEError, "no SAE 'bypas'; known"),
        (FORMATS["cosine groups"].tensors | {"scale_b": torch.zeros(7)}, {}, CheckpointError, "scale_b has 7 entries; expected 1, 3, 10"),
        (without(GLOBAL, "scale_b"), {}, CheckpointError, "no tensor 'scale_b'"),
        (STANDARD | {"log_scale": torch.zeros(())}, {}, CheckpointError, "log_scale: not used by variant standard"),
    ],
)  # fmt: skip
def test_contradictions_and_wrong_keys_are_refused(tmp_path, weights, options, error, says):
    with pytest.raises(error, match=says):
        load_sae(written(tmp_path, weights), **options)
    assert load_sae(written(tmp_path, ONE_EXPONENT), variant="cosine-global").score.kind == "cosine"
