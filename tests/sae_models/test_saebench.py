"""The adapter for SAEBench: shapes, values and what its released code does with an SAE, without running it."""

from dataclasses import asdict

import pytest
import torch

from sae_models.architectures import Architecture, build, named
from sae_models.errors import SAEError
from sae_models.normalise import normalisation
from sae_models.saebench import SAEBenchSAE
from sae_models.selectors import BatchTopK

D_MODEL, D_SAE, K = 16, 48, 5
NAMES = (
    "standard",
    "standard:topk",
    "standard:relu",
    "cosine",
    "bypass",
    "bypass-free-decoder",
    "aligned",
    "tied:relu",
)


def vectors(*shape):
    return torch.randn(*shape, D_MODEL, generator=torch.Generator().manual_seed(1))


def random_sae(architecture, **where):
    generator = torch.Generator().manual_seed(2)
    where = {"model_name": "tiny", "hook_name": "blocks.3.hook_mlp_out"} | where
    sae = build(architecture, D_SAE, K, vectors(50), generator, **where).requires_grad_(False)
    for weight in sae.parameters():
        weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    if isinstance(sae.selector, BatchTopK):
        sae.selector.threshold.fill_(0.2)
    return sae


@pytest.mark.parametrize("name", NAMES)
def test_adapter_computes_the_sae_with_unit_decoder_rows(name):
    """x̂ is the same and latents are multiplied by ‖d_i‖; layout and norms are those that SAEBench checks."""
    sae, x = random_sae(named(name)), vectors(3, 7)
    bench = SAEBenchSAE(sae)
    assert bench.W_enc.shape == (D_MODEL, D_SAE) and bench.W_dec.shape == (D_SAE, D_MODEL)
    assert bench.b_enc.shape == (D_SAE,) and bench.b_dec.shape == (D_MODEL,)
    norm = sae.W_dec.norm(dim=1)
    assert not torch.allclose(norm, torch.ones_like(norm), atol=1e-2) and bench.check_decoder_norms()
    assert torch.allclose(bench.encode(x), sae.encode(x) * norm, atol=1e-6)
    assert torch.allclose(bench(x), sae(x), atol=1e-5)
    assert torch.allclose(bench.decode(bench.encode(x)), bench(x)) and not torch.allclose(sae(x), x, atol=0.1)
    assert torch.allclose(bench.W_enc.T, sae.encoder_rows() * norm[:, None], atol=1e-6)
    # what "core" compares: the cosine of each latent's encoder and decoder
    cosine = torch.nn.functional.cosine_similarity(bench.W_enc.T, bench.W_dec, dim=1)
    assert torch.allclose(
        cosine, torch.nn.functional.cosine_similarity(sae.encoder_rows(), sae.W_dec, dim=1), atol=1e-5
    )


def test_configuration_for_saebench():
    bench = SAEBenchSAE(random_sae(named("standard")), model_name="gpt2", context_size=128, prepend_bos=False)
    cfg = bench.cfg
    assert (cfg.model_name, cfg.d_in, cfg.d_sae, cfg.hook_layer) == ("gpt2", D_MODEL, D_SAE, 3)
    assert (cfg.hook_name, cfg.architecture) == ("blocks.3.hook_mlp_out", "inner_batchtopk")
    assert (cfg.dtype, cfg.device) == ("float32", "cpu")
    assert (cfg.context_size, cfg.prepend_bos, cfg.normalize_activations) == (128, False, "none")
    assert (cfg.metadata.hook_name, cfg.metadata.model_name) == (cfg.hook_name, "gpt2")
    assert (cfg.metadata.context_size, cfg.metadata.prepend_bos) == (128, False)
    assert asdict(cfg)["metadata"]["hook_name"] == cfg.hook_name  # SAEBench writes it into its results
    cfg.dtype = "bfloat16"  # and changes it


def test_dtype_can_be_changed():
    sae, x = random_sae(named("standard:topk")), vectors(20)
    bench = SAEBenchSAE(sae)
    assert bench.to(device="cpu", dtype=torch.bfloat16) is bench
    assert bench.dtype == bench.W_enc.dtype == torch.bfloat16 and bench.cfg.dtype == "bfloat16"
    assert bench(x).dtype == torch.bfloat16 and bench.check_decoder_norms()
    assert sae.dtype == torch.float32  # the user's stays as it is
    assert torch.allclose(SAEBenchSAE(sae).to(torch.float64)(x.double()).float(), sae(x), atol=1e-5)


def test_weights_are_frozen_copies():
    sae, x = random_sae(named("standard:topk")), vectors(20)
    bench = SAEBenchSAE(sae)
    before = bench(x)
    sae.W_dec.mul_(2)
    sae.score.W_enc.mul_(2)
    assert torch.equal(bench(x), before)
    assert not any(p.requires_grad for p in bench.parameters())
    assert isinstance(bench.W_enc, torch.nn.Parameter) and isinstance(bench.W_dec, torch.nn.Parameter)
    sae.W_dec[4] = 0
    bench = SAEBenchSAE(sae)
    assert not bench.check_decoder_norms() and bench(x).isfinite().all()


def test_input_factor_is_folded_in():
    sae = random_sae(named("standard:topk"))
    sae.normalise = normalisation("factor", factor=4.0)
    bench, x = SAEBenchSAE(sae), vectors(20)
    assert torch.allclose(bench(x), sae(x), atol=1e-5)
    assert torch.allclose(bench.b_dec, sae.b_dec / 4)


@pytest.mark.parametrize("kind", ["layer_norm", "constant_norm"])
def test_offset_that_depends_on_x_raises(kind):
    sae = random_sae(Architecture())
    sae.normalise = normalisation(kind)
    with pytest.raises(SAEError, match=f"normalises each input \\({kind}\\) has an offset that depends on x"):
        SAEBenchSAE(sae)


@pytest.mark.parametrize(
    "where", [{"model_name": None}, {"hook_name": None}, {"hook_name": "layers.3"}], ids=["model", "site", "block"]
)
def test_unknown_model_or_site_raises(where):
    with pytest.raises(SAEError, match="SAEBench must know both"):
        SAEBenchSAE(random_sae(named("standard"), **where))
