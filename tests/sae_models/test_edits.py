"""Edits through an SAE's latents: identities, then one edit on every path, against the equation written out here."""

import functools
import math

import jaxtyping
import pytest
import torch

from interventions import (
    EditError,
    Site,
    check_site,
    edit_in_trace,
    fwd_hooks,
    intervened_logits,
    record,
    wrap,
)
from interventions.replaying.hooks import torch_hook
from sae_models.architectures import Architecture, build, named
from sae_models.edits import (
    change_latents,
    clamp_latents,
    keep_latents,
    reconstruct,
    scale_latents,
    zero_latents,
)
from sae_models.errors import BelongingError, SAEError
from sae_models.sae import SAE
from sae_models.selectors import BatchTopK, TopK
from tests.sae_models.built import between, each_pair
from tests.tiny import D_MODEL, TOLERANCE, bridge, forward_alone, fresh, prompts, traced

D_SAE, K = 64, 6
KINDS = {
    "batchtopk": named("standard"),
    "topk": named("standard:topk"),
    "relu": named("standard:relu"),
    "cosine": named("cosine"),
    "layer_norm": Architecture("inner", "topk", normalise="layer_norm"),
    "bypass": named("bypass"),
    "aligned": named("aligned:topk"),
}
ROUNDING = 3e-6
"""of a number of size 1 to 10 in float32 after sums of at most 64 such terms; 1e-6 is seen"""


def random_sae(kind, x):
    """Every weight random: biases, exponents and lengths of decoder rows too; about K latents a row are active."""
    generator = torch.Generator().manual_seed(3)
    x = x.reshape(-1, x.shape[-1])
    sae = build(KINDS[kind], D_SAE, K, x, generator).requires_grad_(False)
    for weight in sae.parameters():
        weight.add_(0.2 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype).to(weight.device))
    if isinstance(sae.selector, BatchTopK):
        scores = sae.score(sae.centred(x), sae.W_dec)
        sae.selector.threshold.fill_(between(scores, K))
    return sae


def margin(sae, x):
    """Smallest distance of a score from where its latent would switch on or off with a jump (inf: there is no such place)."""
    scores = sae.score(sae.centred(x), sae.W_dec)
    if isinstance(sae.selector, BatchTopK):
        return float((scores - sae.selector.threshold).abs().min())
    if isinstance(sae.selector, TopK):
        first, second = scores.topk(K + 1, dim=-1).values[..., -2:].unbind(-1)
        return float((first - second)[first > 0].min())
    return math.inf


class Signed:
    """Latents of either sign, and no class of ours."""

    def __init__(self, device="cpu", dtype=torch.float32):
        generator = torch.Generator().manual_seed(4)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype).to(device)  # noqa: E731
        self.W_enc, self.W_dec, self.b = draw(D_MODEL, D_SAE), draw(D_SAE, D_MODEL), draw(D_MODEL)

    def encode(self, x):
        z = x.to(self.W_enc) @ self.W_enc
        return z * (z.abs() > z.abs().topk(K, dim=-1).values[..., -1:])

    def offset(self, x):
        return self.b.expand(x.shape)


def vectors(*shape, seed=5, dtype=torch.float32):
    return torch.randn(*shape, D_MODEL, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def setting(kind, *shape):
    x = vectors(*(shape or (40,)))
    sae = Signed() if kind == "signed" else random_sae(kind, x)
    return x, sae, sae.encode(x)


def written_out(x, sae, change, keep_error=True):
    """The equation, dense."""
    z = sae.encode(x)
    new = change(z.clone())
    return x + (new - z) @ sae.W_dec if keep_error else new @ sae.W_dec + sae.offset(x)


def put(value, *latents):
    """z′ with `value` at some latents."""

    def change(z):
        z[..., list(latents)] = torch.as_tensor(value, dtype=z.dtype)
        return z

    return change


def close(a, b):
    return torch.allclose(a, b, atol=ROUNDING * max(1.0, float(b.abs().max())), rtol=0)


ALL_KINDS = pytest.mark.parametrize("kind", [*KINDS, "signed"])
EVERYTHING = torch.ones(D_SAE, dtype=torch.bool)


# Identities


@ALL_KINDS
def test_identity_edits_return_x_bit_for_bit(kind):
    x, sae, z = setting(kind)
    assert 1 < (z != 0).sum(1).float().mean() < D_SAE - 1
    assert (z < 0).any() == (kind == "signed")
    assert (sae.offset(x) != 0).any() and not close(reconstruct(x, sae), x)
    strongest = z.abs().sum(0).topk(3).indices
    for same in (
        scale_latents(x, sae, strongest, 1),
        clamp_latents(x, sae, strongest, z[:, strongest]),
        keep_latents(x, sae, EVERYTHING),
        change_latents(x, sae, lambda z: z),
    ):
        assert torch.equal(same, x)


@ALL_KINDS
def test_zeroing_all_latents_leaves_offset_and_error(kind):
    """Zeroing all latents leaves offset and error; keeping all without the error gives x̂."""
    x, sae, z = setting(kind)
    error = x - reconstruct(x, sae)
    assert close(zero_latents(x, sae, EVERYTHING), sae.offset(x) + error)
    assert close(zero_latents(x, sae, EVERYTHING, keep_error=False), sae.offset(x))
    assert close(keep_latents(x, sae, EVERYTHING, keep_error=False), reconstruct(x, sae))
    assert close(reconstruct(x, sae), z @ sae.W_dec + sae.offset(x))
    latents = [0, 7, 9]
    for edit in (zero_latents, keep_latents):
        assert close(edit(x, sae, latents) - edit(x, sae, latents, keep_error=False), error)


@pytest.mark.parametrize(
    ("kind", "keep_error", "shape"), each_pair([*KINDS, "signed"], [True, False], [(40,), (5, 8)]), ids=str
)
def test_edits_match_their_equation(kind, keep_error, shape):
    x, sae, z = setting(kind, *shape)
    latents = z.abs().flatten(0, -2).sum(0).topk(3).indices
    i, j, k = latents.tolist()
    value = torch.tensor([1.5, -2.0, 0.0])
    scaled = lambda z: z.index_copy(-1, latents, z[..., latents] * value)  # noqa: E731
    kept = lambda z: torch.zeros_like(z).index_copy(-1, latents, z[..., latents])  # noqa: E731
    for found, change in (
        (zero_latents(x, sae, latents, keep_error=keep_error), put(0, i, j, k)),
        (clamp_latents(x, sae, latents, -3, keep_error=keep_error), put(-3, i, j, k)),
        (clamp_latents(x, sae, latents, value, keep_error=keep_error), put(value, i, j, k)),
        (scale_latents(x, sae, latents, value, keep_error=keep_error), scaled),
        (keep_latents(x, sae, latents, keep_error=keep_error), kept),
        (change_latents(x, sae, lambda z: z.roll(1, -1), keep_error=keep_error), lambda z: z.roll(1, -1)),
        (change_latents(x, sae, lambda z: z.zero_(), keep_error=keep_error), torch.zeros_like),
        (zero_latents(x, sae, i, keep_error=keep_error), put(0, i)),
    ):
        expected = written_out(x, sae, change, keep_error)
        assert found.shape == x.shape and close(found, expected)
        assert not close(expected, x) and not close(expected, reconstruct(x, sae))


def test_latents_may_be_lists_tensors_or_masks():
    x, sae, _ = setting("topk")
    mask = torch.zeros(D_SAE, dtype=torch.bool)
    mask[[3, 8]] = True
    expected = zero_latents(x, sae, [3, 8])
    for latents in ((8, 3), torch.tensor([3, 8]), torch.tensor([8, 3], dtype=torch.int32), mask):
        assert close(zero_latents(x, sae, latents), expected)
    assert close(zero_latents(x, sae, 3), zero_latents(x, sae, torch.tensor(3)))
    assert close(clamp_latents(x, sae, [8, 3], torch.tensor([1.0, 2.0])), written_out(x, sae, put([2.0, 1.0], 3, 8)))


@pytest.mark.parametrize(
    ("kind", "keep_error", "shape"),
    each_pair(["topk", "layer_norm", "signed"], [True, False], [(12,), (3, 4)]),
    ids=str,
)
def test_latents_per_row_match_rows_edited_alone(kind, keep_error, shape):
    """With padding anywhere, and values and factors for each row or each latent of a row."""
    x, sae, z = setting(kind, *shape)
    sets = z.abs().topk(3, dim=-1).indices
    sets.view(-1, 3)[::3, 1] = -1
    sets.view(-1, 3)[1::3, 0:2] = -1
    value = torch.arange(1.0, 1 + sets.numel()).view(sets.shape)
    for edit, given in (
        (zero_latents, ()),
        (keep_latents, ()),
        (clamp_latents, (value,)),
        (clamp_latents, (value[..., :1],)),
        (clamp_latents, (0.5,)),
        (scale_latents, (-value,)),
        (scale_latents, (value[..., 1:2],)),
    ):
        found = edit(x, sae, sets, *given, keep_error=keep_error).flatten(0, -2)
        for row, (one, own) in enumerate(zip(x.flatten(0, -2), sets.flatten(0, -2), strict=True)):
            used = own >= 0
            its = [v if isinstance(v, float) else v.flatten(0, -2)[row].expand(3)[used] for v in given]
            assert close(found[row], edit(one[None], sae, own[used], *its, keep_error=keep_error)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keep_error", [True, False])
def test_dtype_of_x_is_kept(dtype, keep_error):
    """In float64, what is not edited stays bitwise equal, though the SAE is float32."""
    _, sae, _ = setting("topk")
    x = vectors(6, dtype=torch.float64).to(dtype)
    for edit in (
        functools.partial(zero_latents, latents=EVERYTHING),
        functools.partial(clamp_latents, latents=3, value=2.0),
        functools.partial(keep_latents, latents=[1, 2]),
        functools.partial(change_latents, change=torch.neg),
    ):
        found = edit(x, sae, keep_error=keep_error)
        assert found.dtype == dtype
        wide = edit(x.float(), sae, keep_error=keep_error)
        assert torch.allclose(found.float(), wide, atol=10 * (1e-2 if dtype == torch.bfloat16 else 1e-6), rtol=0)
    assert reconstruct(x, sae).dtype == dtype
    assert torch.equal(scale_latents(x, sae, 3, 1.0), x)


def test_only_decoder_rows_of_the_edited_latents_are_read():
    """All other rows are nan, which a dense product would show."""
    x, sae, _ = setting("topk")
    expected = [zero_latents(x, sae, [3, 8]), clamp_latents(x, sae, 3, 2.0), keep_latents(x, sae, 8, keep_error=False)]
    rest = torch.ones(D_SAE, dtype=torch.bool)
    rest[[3, 8]] = False
    sae.W_dec[rest] = torch.nan
    found = [zero_latents(x, sae, [3, 8]), clamp_latents(x, sae, 3, 2.0), keep_latents(x, sae, 8, keep_error=False)]
    each = torch.tensor([[3], [8]]).repeat(20, 1)
    assert all(close(a, b) for a, b in zip(found, expected, strict=True))
    assert zero_latents(x, sae, each).isfinite().all() and change_latents(x, sae, put(1.0, 8)).isfinite().all()


# Errors


@pytest.fixture
def unchecked_shapes():
    """As a user runs it: no shapes are checked at the door but by the functions themselves."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.mark.parametrize("edit", [zero_latents, keep_latents])
@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (D_SAE, "latent 64 does not exist; the SAE has 64, from 0"),
        ([3, -1], "latent -1 does not exist"),
        (torch.tensor([[0, 64]] * 40), "latent 64 does not exist; the SAE has 64, from 0 (−1 pads)"),
        (torch.tensor([[0, -2]] * 40), "latent -2 does not exist"),
        ([], "an empty set of latents"),
        (torch.zeros(D_SAE, dtype=torch.bool), "an empty set of latents"),
        (torch.tensor([[0, 1]] * 39 + [[-1, -1]]), "an empty set of latents; give at least one (in each row)"),
        ([3, 8, 3], "latent 3 is given twice"),
        (torch.tensor([[0, 5, 5]] * 40), "latent 5 is given twice"),
        (torch.ones(D_SAE - 1, dtype=torch.bool), "truth values of shape [63] for latents; expected [64]"),
        (torch.zeros(39, 2, dtype=torch.long), "[39, 2] for activations [40, 32]; expected one set for all, [latent], or"),
        (torch.tensor([1.0]), "latents of dtype torch.float32"),
    ],
    ids=str,
)  # fmt: skip
def test_invalid_latents_raise(latents, message, edit, unchecked_shapes):
    x, sae, _ = setting("topk")
    with pytest.raises(SAEError) as caught:
        edit(x, sae, latents)
    assert message in str(caught.value)


@pytest.mark.parametrize("edit", [clamp_latents, scale_latents])
@pytest.mark.parametrize("shape", [(3,), (40,), (40, 3), (1,), (1, 2), (39, 1)], ids=str)
def test_values_of_wrong_shape_raise(shape, edit, unchecked_shapes):
    x, sae, _ = setting("topk")
    with pytest.raises(SAEError, match=r"of shape .*; expected one of \[\], \[2\], \[40, 1\], \[40, 2\]"):
        edit(x, sae, [0, 1], torch.ones(shape))


def test_wrong_width_raises(unchecked_shapes):
    _, sae, _ = setting("signed")
    for edit in (
        reconstruct,
        functools.partial(zero_latents, latents=3),
        functools.partial(change_latents, change=abs),
    ):
        with pytest.raises(BelongingError, match="activations of width 31 for an SAE of width 32"):
            edit(vectors(4)[:, 1:], sae)


def test_change_of_wrong_shape_raises(unchecked_shapes):
    x, sae, _ = setting("topk")
    with pytest.raises(SAEError, match=r"latents of shape \[40, 63\]; expected \[40, 64\]"):
        change_latents(x, sae, lambda z: z[:, 1:])


# On every path


EVEN, AT, END = prompts((12, 12, 12)), 7, 12
PLACES = [
    ("llama", Site(2), "batchtopk"),
    ("gpt2", Site(3, "mlp_out"), "batchtopk"),
    ("gemma2", Site(2, "attn_out"), "bypass"),
]
# Every model on every path; an edit knows no path, so that every other kind of SAE goes on one.
CASES = [(*place, path) for place in PLACES for path in ("plain", "nnsight", "replay")]
CASES += [pytest.param(*place, "bridge", marks=pytest.mark.bridge) for place in PLACES]
CASES += [("llama", Site(2), kind, "replay") for kind in (*KINDS, "signed") if kind != "batchtopk"]
CASES += [("llama", Site(2), "signed", path) for path in ("plain", "nnsight")]


def edits(latents):
    """name -> (edit, the change it makes, whether the error stays)"""
    a, b, c = latents.tolist()
    kept = lambda z: torch.zeros_like(z).index_copy(-1, latents, z[..., latents])  # noqa: E731
    doubled = lambda z: z.index_copy(-1, latents, 2 * z[..., latents])  # noqa: E731
    return {
        "reconstruct": (reconstruct, lambda z: z, False),
        "zero": (functools.partial(zero_latents, latents=latents), put(0, a, b, c), True),
        "zero without the error": (
            functools.partial(zero_latents, latents=latents, keep_error=False),
            put(0, a, b, c),
            False,
        ),
        "clamp": (functools.partial(clamp_latents, latents=a, value=4.0), put(4.0, a), True),
        "scale": (functools.partial(scale_latents, latents=latents, factor=2.0), doubled, True),
        "keep": (functools.partial(keep_latents, latents=latents), kept, True),
        "keep without the error": (functools.partial(keep_latents, latents=latents, keep_error=False), kept, False),
    }


@functools.cache
def recorded(name, site, device):
    return record(wrap(fresh(name, device)), EVEN, [site])


@functools.cache
def placed(name, site, kind, device):
    """What is shared: a recording, an SAE trained on nothing at its site, and its three strongest latents."""
    recording = recorded(name, site, device)
    x = recording.activations[site]
    sae = Signed(device) if kind == "signed" else random_sae(kind, x)
    return recording, sae, sae.encode(x[:, AT]).abs().sum(0).topk(3).indices


@functools.cache
def wrapped(name, wrapper, device):
    return bridge(name, fresh(name, device)) if wrapper == "bridge" else traced(fresh(name, device))


def logits_by(path, name, site, edit, recording, device):
    """`[prompt, pos, vocab]` from `AT` on."""
    tokens = torch.tensor(EVEN, device=device)
    if path == "bridge":
        model = wrapped(name, path, device)
        with fwd_hooks(site, edit, AT) as hooks:
            return model.run_with_hooks(tokens, fwd_hooks=hooks)[:, AT:]
    if path == "nnsight":
        model = wrapped(name, path, device)
        check_site(model, site)
        with model.trace(tokens):
            edit_in_trace(model, site, edit, AT)
            logits = model.output.logits.save()
        return logits[:, AT:]
    if path == "replay":
        prompt, position = torch.arange(len(EVEN)), torch.full((len(EVEN),), AT)
        new = edit(recording.at(site, prompt, position))
        return intervened_logits(recording, site, prompt, position, new, horizon=END - AT, path="replay")
    with torch_hook(recording.model, site, edit, AT):
        return recording.model.hf(input_ids=tokens).logits[:, AT:]


@functools.cache
def references(name, site, kind, device):
    """Full forward passes under the equation written out, of each edit, and the clean one; `[prompt, pos, vocab]` from `AT` on."""
    recording, sae, latents = placed(name, site, kind, device)

    def logits(at):
        return torch.stack([forward_alone(name, recording.model.hf, tokens, site, at)[AT:] for tokens in EVEN])

    expected = {}
    for what, (_, change, keep_error) in edits(latents).items():
        expected[what] = logits({AT: lambda x, c=change, k=keep_error: written_out(x[None], sae, c, k)[0]})
    return expected, logits({})


@pytest.mark.parametrize(("name", "site", "kind", "path"), CASES, ids=str)
def test_edits_agree_on_every_path(name, site, kind, path, device):
    recording, sae, latents = placed(name, site, kind, device)
    if isinstance(sae, SAE):  # activations differ by 1e-5 between the paths; no latent may switch by that
        assert margin(sae, recording.activations[site][:, AT]) > 1e-4
    expected, clean = references(name, site, kind, device)
    for what, (edit, _, _) in edits(latents).items():
        found = logits_by(path, name, site, functools.partial(edit, sae=sae), recording, device)
        assert (found - expected[what]).abs().max() <= TOLERANCE, what
        assert (found - clean).abs().max() > 20 * TOLERANCE, what


@pytest.mark.bridge
def test_bridge_edit_that_changes_nothing_raises(device):
    model = wrapped("llama", "bridge", device)
    _, sae, latents = placed("llama", Site(2), "topk", device)
    same = functools.partial(scale_latents, sae=sae, latents=latents, factor=1.0)
    with pytest.raises(EditError, match="changed nothing"), fwd_hooks(Site(2), same, AT) as hooks:
        model.run_with_hooks(torch.tensor(EVEN, device=device), fwd_hooks=hooks)
