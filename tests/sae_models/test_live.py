import copy
import math
import warnings

import pytest
import torch
from torch import nn

from sae_models import SAEError, as_sae, save_sae
from sae_models.sae import SAE
from sae_models.scores import Inner
from sae_models.selectors import ReLU
from tests.sae_models.written import D_MODEL, D_SAE, K, assert_same, drawn, inputs, strongest


class Plain(nn.Module):
    """An SAE as many write it."""

    def __init__(self):
        super().__init__()
        self.W_enc = nn.Parameter(drawn(D_MODEL, D_SAE))
        self.W_dec = nn.Parameter(drawn(D_SAE, D_MODEL, seed=1))
        self.bias = nn.Parameter(drawn(D_MODEL, seed=2))

    def encode(self, x):
        return strongest(torch.relu((x - self.bias) @ self.W_enc), K)

    def decode(self, z):
        return z @ self.W_dec + self.bias


class Layers(nn.Module):
    """As dictionary_learning keeps its weights, for two dimensions only."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(D_MODEL, D_SAE), nn.Linear(D_SAE, D_MODEL)

    def encode(self, x):
        assert x.ndim == 2
        return torch.relu(self.encoder(x))

    def decode(self, z):
        return self.decoder(z)


def test_our_sae_is_returned_unchanged():
    sae = SAE(Inner(drawn(D_SAE, D_MODEL), drawn(D_SAE)), ReLU(), drawn(D_SAE, D_MODEL), drawn(D_MODEL))
    assert as_sae(sae) is sae


class Compiled(nn.Module):
    """As torch.compile wraps a module."""

    def __init__(self, module):
        super().__init__()
        self._orig_mod = module

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "_orig_mod" else getattr(self._modules["_orig_mod"], name)


@pytest.mark.parametrize(
    "make",
    [Plain, Layers, lambda: nn.DataParallel(Plain()), lambda: Compiled(Plain())],
    ids=["plain", "layers", "data parallel", "compiled"],
)
def test_object_with_encode_and_a_linear_decode_is_wrapped(make, device, tmp_path):
    thing = make()
    sae = as_sae(thing, hook_name="blocks.1.hook_resid_post")
    thing = getattr(thing, "module", thing)
    flat = inputs().reshape(-1, D_MODEL)
    with torch.no_grad():
        z = thing.encode(flat)
        assert_same(sae.encode(inputs()).reshape(-1, D_SAE), z)
        assert_same(sae(inputs()).reshape(-1, D_MODEL), thing.decode(z))
        assert_same(sae.encode(inputs()) @ sae.W_dec + sae.offset(inputs()), sae(inputs()))
        assert_same(sae.decode(sae.encode(inputs())), sae(inputs()))
    assert (sae.d_model, sae.d_sae, sae.hook_name) == (D_MODEL, D_SAE, "blocks.1.hook_resid_post")
    with pytest.raises(SAEError, match=r"the encoder of a .* is known as a function only"):
        sae.alignment()
    with pytest.raises(SAEError, match="known as a function only"):
        save_sae(sae, tmp_path / "wrapped")
    wide = as_sae(copy.deepcopy(thing).double())(inputs())
    assert_same(sae.to(device=device, dtype=torch.float64)(inputs().to(device)).cpu(), wide)


@pytest.mark.parametrize("kind", [Plain, Layers])
def test_weights_are_copied(kind):
    thing = kind()
    before = copy.deepcopy(thing.state_dict())
    sae = as_sae(thing)
    expected = sae(inputs())
    with torch.no_grad():
        for parameter in thing.parameters():
            parameter.mul_(2)
    assert torch.equal(sae(inputs()), expected)
    thing.load_state_dict(before)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.mul_(2)
    assert all(torch.equal(value, before[key]) for key, value in thing.state_dict().items())


class Stateful(Plain):
    def encode(self, x):
        self.norm = x.norm(dim=-1, keepdim=True)
        return super().encode(x / self.norm)

    def decode(self, z):
        return super().decode(z) * self.norm


class Squared(Plain):
    def decode(self, z):
        return super().decode(z.square())


class OtherDecoder(Plain):
    def decode(self, z):
        return z @ self.W_dec.flip(0) + self.bias


class Batch(Plain):
    def encode(self, x):
        s = torch.relu((x - self.bias) @ self.W_enc)
        return s * (s >= s.flatten().topk(K * len(x)).values[-1])


class Tuples(Plain):
    def encode(self, x):
        return super().encode(x), {}


class NoDecoder(nn.Module):
    def encode(self, x):
        return x


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Stateful, "decoding of a Stateful is not z @ W_dec"),
        (Squared, "decoding of a Squared is not z @ W_dec"),
        (OtherDecoder, "decoding of a OtherDecoder is not z @ W_dec"),
        (Batch, "latents of a Batch depend on what else is in the batch"),
        (Tuples, r"encode of a Tuples gives a tuple; expected latents \(16, 40\)"),
        (NoDecoder, r"a NoDecoder has no encode, decode and W_dec \[d_sae, d_model\]; save it and use load_sae"),
    ],
)
def test_objects_without_a_linear_decoder_are_refused(kind, says):
    with pytest.raises(SAEError, match=says):
        as_sae(kind())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["W_enc", "W_dec", "bias"])
def test_nan_and_infinite_weights_are_refused(name, value):
    thing = Plain()
    getattr(thing, name).data.reshape(-1)[3] = value
    with pytest.raises(SAEError, match=f"{name} of a Plain holds values that are not numbers"):
        as_sae(thing)


def test_complex_and_float8_weights_are_refused():
    thing = Plain()
    thing.W_dec = nn.Parameter(thing.W_dec.detach().to(torch.complex64))
    with pytest.raises(SAEError, match=r"W_dec of a Plain is a tensor of torch\.complex64"):
        as_sae(thing)
    thing.W_dec = nn.Parameter(thing.W_dec.detach().real.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(SAEError, match=r"a Plain of torch\.float8_e4m3fn, in which nothing can be computed"):
        as_sae(thing)


class Lens(nn.Module):
    """An object that looks like one of SAELens: a configuration, and its weights by name."""

    class Config:
        def to_dict(self):
            return {
                "architecture": "standard",
                "d_in": D_MODEL,
                "d_sae": D_SAE,
                "metadata": {"hook_name": "blocks.1.hook_resid_post"},
            }

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.cfg = self.Config()
        shapes = {"W_enc": (D_MODEL, D_SAE), "W_dec": (D_SAE, D_MODEL), "b_enc": (D_SAE,), "b_dec": (D_MODEL,)}
        for seed, (name, shape) in enumerate(shapes.items()):
            setattr(self, name, nn.Parameter(drawn(*shape, seed=seed).to(dtype), requires_grad=False))


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_infinite_weights_in_a_saelens_object_are_refused(name):
    thing = Lens()
    getattr(thing, name).data.reshape(-1)[3] = math.inf
    with pytest.raises(SAEError, match=rf"a live Lens: {name} holds values that are not numbers \(1 of"):
        as_sae(thing)


def test_saelens_objects_in_float8_or_compiled_are_accepted():
    expected = as_sae(Lens())
    assert torch.equal(as_sae(Compiled(Lens()))(inputs()), expected(inputs()))
    assert torch.equal(as_sae(nn.DataParallel(Lens()))(inputs()), expected(inputs()))
    thing = Lens(torch.float8_e5m2)
    sae = as_sae(thing)
    assert sae.dtype == torch.float32 and torch.equal(sae.W_dec, thing.W_dec.float())


def test_unused_options_are_refused():
    with pytest.raises(SAEError, match="option k has no use for a live object"):
        as_sae(Plain(), k=3)


@pytest.mark.bridge
def test_saelens_object_keeps_device_and_dtype(device):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations of its dependencies, as it is imported
        lens = pytest.importorskip("sae_lens")
    cfg = lens.StandardSAEConfig(d_in=D_MODEL, d_sae=D_SAE, dtype="float64", device=device)
    theirs = lens.StandardSAE(cfg)
    sae = as_sae(theirs, model_name="gpt2")
    assert sae.dtype == torch.float64 and sae.device.type == torch.device(device).type and sae.model_name == "gpt2"
    x = inputs().double().to(device)
    expected = sae(x)
    assert_same(expected, theirs(x))
    with torch.no_grad():
        theirs.W_dec.mul_(2)
        theirs.b_dec.add_(1)
    cfg.metadata.model_name = "other"
    assert torch.equal(sae(x), expected) and sae.model_name == "gpt2"


@pytest.mark.bridge
@pytest.mark.parametrize("kind", ["Standard", "TopK", "JumpReLU", "Gated"])
def test_saelens_object_works_everywhere(kind, tmp_path):
    from diagnostics.sae_evaluation.run import evaluate_saes
    from interventions import Site, fwd_hooks, intervened_logits, record
    from interventions.spliced import spliced
    from sae_models.belonging import sae_site
    from sae_models.edits import reconstruct, zero_latents
    from sae_models.saebench import SAEBenchSAE
    from sae_models.swap import swap_score
    from tests.tiny import bridge, fresh

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations of its dependencies, as it is imported
        lens = pytest.importorskip("sae_lens")
        hf = fresh("llama")
        d_model, site = hf.config.hidden_size, Site(2)
        metadata = lens.saes.sae.SAEMetadata(model_name="llama", hook_name=site.hook_name)
        settings = {"k": 4} if kind == "TopK" else {}
        config = getattr(lens, f"{kind}SAEConfig")(d_in=d_model, d_sae=24, metadata=metadata, **settings)
        theirs = getattr(lens, f"{kind}SAE")(config)
        handle = bridge("llama", hf)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter))))
    theirs.requires_grad_(False)
    tokens = [[5, 3, 8, 1, 9, 4], [7, 2, 6, 6, 1]]
    recording = record(hf, tokens, [site])
    theirs.cfg.metadata.model_name = recording.model.name
    assert sae_site(theirs, hf) == site

    prompt, position = torch.tensor([0, 1]), torch.tensor([3, 2])
    x = recording.at(site, prompt, position)
    by_hand = x - theirs.encode(x)[:, [1, 7]] @ theirs.W_dec[[1, 7]]
    torch.testing.assert_close(zero_latents(x, theirs, [1, 7]), by_hand, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(reconstruct(x, theirs), theirs(x), atol=1e-5, rtol=1e-5)
    replayed = intervened_logits(recording, site, prompt[:1], position[:1], theirs(x)[:1])
    with fwd_hooks(site, lambda h: reconstruct(h, theirs), position=3) as hooks:
        hooked = handle.run_with_hooks(torch.tensor(tokens[:1]), fwd_hooks=hooks)
    torch.testing.assert_close(replayed.flatten(), hooked[0, 3], atol=1e-4, rtol=1e-4)

    whole = spliced(recording, site, {"sae": lambda h: reconstruct(h, theirs)})
    assert float(whole.kl["sae"].nan_to_num().sum()) > 0
    found = evaluate_saes(hf, tokens, [theirs], skip_first=0, splice_prompts=None)
    line = found.summary().iloc[0]
    every = torch.cat([recording.activations[site][i, : len(ids)] for i, ids in enumerate(tokens)])
    assert line.l0 == pytest.approx(float((theirs.encode(every) != 0).double().sum(1).mean()))
    assert line.mse == pytest.approx(float((every - theirs(every)).square().sum(1).mean()), rel=1e-4)
    ours = as_sae(theirs)
    save_sae(ours, tmp_path / kind)
    assert_same(lens.SAE.load_from_disk(tmp_path / kind)(every), theirs(every))
    bench = SAEBenchSAE(ours)
    torch.testing.assert_close(bench.decode(bench.encode(every)), theirs(every), atol=1e-4, rtol=1e-4)
    if kind != "Gated":
        assert swap_score(ours, every)(every).shape == every.shape
