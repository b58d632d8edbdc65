import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from sae_models import CheckpointError, SAEError, load_sae, save_sae
from sae_models.selectors import BatchTopK
from tests.sae_models.written import D_MODEL, D_SAE, K, assert_same, drawn, inputs, strongest

GROUPS = 3
"""40 latents: slices of 13, 13 and 14."""
START = math.log(math.sqrt(D_MODEL))
WEIGHTS = {"W_enc": drawn(D_SAE, D_MODEL), "b_enc": 0.3 * drawn(D_SAE, seed=1), "b_dec": drawn(D_MODEL, seed=3)}
WEIGHTS |= {"W_dec": F.normalize(drawn(D_SAE, D_MODEL, seed=2), dim=-1), "threshold": torch.tensor(1.2)}


def near(value, *shape, seed=5):
    return value + 0.2 * drawn(*shape, seed=seed)


SCALES = {
    "standard": {},
    "cosine-global": {"scale_a": torch.tensor(0.3), "scale_b": torch.tensor(START)},
    "cosine-group3": {"scale_a": near(0.3, GROUPS), "scale_b": near(START, GROUPS, seed=6)},
    "cosine-feature": {"scale_a": near(0.3, D_SAE), "scale_b": near(START, D_SAE, seed=6)},
    "cosine-delta": {
        "scale_a_base": torch.tensor(0.3),
        "scale_a_delta": near(0, D_SAE),
        "scale_b": near(START, D_SAE, seed=6),
    },
    "cosine-pure": {"scale_b": torch.tensor(START)},
}


def per_latent(scale):
    """One entry a latent, from one for each slice; the remainder joins the last."""
    flat = scale.reshape(-1).tolist()
    size = D_SAE // len(flat)
    return torch.tensor([flat[min(i // size, len(flat) - 1)] for i in range(D_SAE)])


def score(w, x):
    x_c = x - w["b_dec"]
    if "scale_b" not in w:
        return x_c @ w["W_enc"].T + w["b_enc"]
    norm = x_c.norm(dim=-1, keepdim=True)
    cos = F.normalize(x_c, dim=-1) @ F.normalize(w["W_enc"], dim=-1).T
    if "scale_a_base" in w:
        a = w["scale_a_base"] + w["scale_a_delta"]
    else:
        a = per_latent(w.get("scale_a", torch.tensor(0.0)))
    return torch.exp(a * torch.log(norm) + per_latent(w["scale_b"])) * cos + w["b_enc"]


def original(w, x):
    s = torch.relu(score(w, x))
    z = s * (s > w["threshold"])
    return z, z @ w["W_dec"] + w["b_dec"]


def without(weights, *keys):
    return {key: value for key, value in weights.items() if key not in keys}


def written(folder, weights, name="adaptive_L27_final.pt"):
    if name.endswith(".pt"):
        torch.save(weights, folder / name)
    else:
        save_file(weights, folder / name)
    return folder / name


@pytest.mark.parametrize("file", ["final.pt", "final.safetensors"])
@pytest.mark.parametrize("variant", SCALES)
def test_the_variant_is_known_by_keys_and_shapes(tmp_path, variant, file):
    weights = WEIGHTS | SCALES[variant]
    sae = load_sae(written(tmp_path, weights, file), model_name="Qwen/Qwen3-8B", hook_name="blocks.27.hook_resid_post")
    z, expected = original(weights, inputs())
    assert sae.metadata["variant"] == variant and 0 < (z > 0).float().mean() < 0.9
    assert_same(sae.encode(inputs()), z)
    assert_same(sae(inputs()), expected)
    assert (sae.model_name, sae.hook_name) == ("Qwen/Qwen3-8B", "blocks.27.hook_resid_post")
    again = load_sae(save_sae(sae, tmp_path / "saved"))
    assert torch.equal(again(inputs()), sae(inputs()))


def test_one_number_may_have_a_dimension_or_none(tmp_path):
    scales = {key: value.reshape(1) for key, value in SCALES["cosine-global"].items()}
    sae = load_sae(written(tmp_path, WEIGHTS | scales))
    assert_same(sae(inputs()), original(WEIGHTS | scales, inputs())[1])


def test_k_is_kept_and_needed_without_a_threshold(tmp_path):
    weights = WEIGHTS | SCALES["cosine-global"]
    sae = load_sae(written(tmp_path, weights), k=K)
    assert isinstance(sae.selector, BatchTopK) and sae.selector.k == K
    assert_same(sae(inputs()), original(weights, inputs())[1])
    path = written(tmp_path, without(weights, "threshold"))
    with pytest.raises(CheckpointError, match=r"no threshold in the file.*give k="):
        load_sae(path)
    z = strongest(torch.relu(score(weights, inputs())))
    assert_same(load_sae(path, k=K)(inputs()), z @ weights["W_dec"] + weights["b_dec"])


def bypass(w, x, unit_encoder=True, unit_decoder=True, restore=True):
    x_c = x - w["b_dec"]
    norm = x_c.norm(dim=-1, keepdim=True).clamp(min=1e-8)
    s = torch.relu(x_c / norm @ (F.normalize(w["W_enc"], dim=-1) if unit_encoder else w["W_enc"]).T)
    r = (s * (s > w["threshold"])) @ (F.normalize(w["W_dec"], dim=-1) if unit_decoder else w["W_dec"])
    return (r * norm / r.norm(dim=-1, keepdim=True).clamp(min=1e-8) if restore else r) + w["b_dec"]


UNIT = without(WEIGHTS, "b_enc") | {"W_enc": F.normalize(WEIGHTS["W_enc"], dim=-1), "threshold": torch.tensor(0.2)}


def test_neither_bias_nor_scales_is_a_magnitude_bypass(tmp_path):
    sae = load_sae(written(tmp_path, UNIT))
    assert sae.metadata["variant"] == "bypass"
    assert_same(sae(inputs()), bypass(UNIT, inputs()))
    assert_same(sae.encode(inputs()) @ sae.W_dec + sae.b_dec, bypass(UNIT, inputs()))


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
def test_its_switches_are_given(tmp_path, variant, switches):
    rows = torch.linspace(0.6, 1.5, D_SAE)[:, None]
    weights = UNIT | {"W_enc": UNIT["W_enc"] * rows, "W_dec": UNIT["W_dec"] * rows.flip(0)}
    path = written(tmp_path, weights)
    assert_same(load_sae(path, variant=variant)(inputs()), bypass(weights, inputs(), **switches))
    with pytest.raises(CheckpointError, match=r"rows of W_enc have norms from 0.6 to 1.5; expected 1.*give variant="):
        load_sae(path)


def test_what_is_refused(tmp_path):
    def load(weights, **options):
        return load_sae(written(tmp_path, weights), **options)

    scaled = WEIGHTS | SCALES["cosine-global"]
    with pytest.raises(CheckpointError, match=r"threshold = -1\.0: saved before it was learned"):
        load(scaled | {"threshold": torch.tensor(-1.0)})
    with pytest.raises(CheckpointError, match=r"one exponent beside one b a latent.*variant='cosine-global'"):
        load(scaled | {"scale_b": near(START, D_SAE)})
    assert load(scaled | {"scale_b": near(START, D_SAE)}, variant="cosine-global").score.kind == "cosine"
    with pytest.raises(
        CheckpointError, match="variant 'cosine-pure' was given, and keys and shapes say 'cosine-global'"
    ):
        load(scaled, variant="cosine-pure")
    with pytest.raises(
        CheckpointError, match="variant 'standard' was given, and without b_enc this is a magnitude bypass"
    ):
        load(UNIT, variant="standard")
    with pytest.raises(SAEError, match="no SAE 'bypas'; known"):
        load(UNIT, variant="bypas")
    with pytest.raises(CheckpointError, match="scale_b has 7 entries; expected 1, 3, 40"):
        load(WEIGHTS | SCALES["cosine-group3"] | {"scale_b": torch.zeros(7)})
    with pytest.raises(CheckpointError, match="no tensor 'scale_b'"):
        load(without(scaled, "scale_b"))
    with pytest.raises(CheckpointError, match="log_scale: not used by variant standard"):
        load(WEIGHTS | {"log_scale": torch.zeros(())})
