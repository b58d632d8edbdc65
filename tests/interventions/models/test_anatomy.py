"""Where attention and MLP write: what is recorded there adds up, and a site that a block does not have is refused.

`tests.tiny` says for each architecture which module's output is added to the stream, read off its code by hand.
"""

import copy
import gc
import weakref

import pytest
import torch

from interventions import Site, SiteError, check_site, measure, record, wrap
from interventions.models.anatomy import _kinds, at_site
from interventions.sites import POINTS
from tests.tiny import (
    BRIDGED,
    HOOKED,
    N_LAYERS,
    PARALLEL,
    REPLAYED,
    STREAM,
    VARIANTS,
    changed_in,
    fresh,
    points,
    prompts,
    sites,
    tiny_model,
    wrapped,
)

ALL = (*REPLAYED, *HOOKED, *VARIANTS)
INSIDE = tuple(name for name in ALL if points(name) != STREAM)
UNKNOWN = tuple(name for name in ALL if points(name) == STREAM)
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""of a sum, relative to its largest term: half a unit in the last place for each of two additions, and as much again"""


def adds_up(recording, layer, parallel=False):
    """resid_pre + attn_out = resid_mid, resid_mid + mlp_out = resid_post, on the prompts' own tokens."""
    for i, n in enumerate(recording.length.tolist()):
        pre, attn, mlp, post = (
            recording.activations[Site(layer, point)][i, :n]
            for point in ("resid_pre", "attn_out", "mlp_out", "resid_post")
        )
        mid = pre + attn
        terms = [x.float() for x in (pre, attn, mlp, post, mid, attn + mlp)]
        allowed = 2 * ROUNDING[recording.model.dtype] * torch.stack(terms).abs().amax(0)
        assert ((terms[0] + terms[1] + terms[2] - terms[3]).abs() <= allowed).all()
        assert min(attn.abs().max(), mlp.abs().max()) > 0.1
        if not parallel:
            assert torch.equal(recording.activations[Site(layer, "resid_mid")][i, :n], mid)


# What is recorded


@pytest.mark.parametrize("name", ALL)
def test_recorded_activations_equal_module_outputs_and_add_up(name, device):
    hf, tokens = tiny_model(name, device), prompts()
    here = sites(name, (0, N_LAYERS - 1))
    recording = record(hf, tokens, here)
    for layer in (0, N_LAYERS - 1) if name in INSIDE else ():
        adds_up(recording, layer, name in PARALLEL)
    for site in here:
        seen = []
        remove = changed_in(name, hf, site, lambda x, seen=seen: seen.append(x.clone()) or x)
        with torch.no_grad():
            hf(input_ids=torch.tensor([tokens[0]], device=device))
        remove()
        there, expected = recording.activations[site][0], seen[0][0]  # batches of other shapes sum in another order
        assert (there - expected).abs().max() <= 1e-5 * max(10.0, float(expected.abs().max()))


@pytest.mark.bridge
@pytest.mark.parametrize("name", [name for name in BRIDGED if name in INSIDE])
def test_recorded_activations_of_a_bridge_add_up(name, device):
    recording = record(wrapped(name, "bridge", device), prompts(), sites(name, (2,)))
    adds_up(recording, 2, name in PARALLEL)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama", torch.float16), ("gemma3", torch.bfloat16), ("opt", torch.float16), ("gpt_neox", torch.bfloat16)],
    ids=str,
)
def test_half_precision_activations_add_up(name, dtype, device):
    recording = record(tiny_model(name, device, dtype), prompts(), sites(name, (2,)))
    adds_up(recording, 2, name in PARALLEL)


@pytest.mark.parametrize("point", POINTS)
def test_at_site_sees_every_pass_and_can_replace_values(point, device):
    model, site, seen = wrap(tiny_model("opt", device)), Site(2, point), []
    ids = torch.tensor(prompts((7, 7)), device=device)
    with torch.no_grad():
        clean = model.hf(input_ids=ids).logits
        with at_site(model, site, lambda x: seen.append(x)):
            assert torch.equal(model.hf(input_ids=ids).logits, clean)
            model.hf(input_ids=ids[:1])
        with at_site(model, site, lambda x: x.roll(1, dims=-1)):
            assert not torch.allclose(model.hf(input_ids=ids).logits, clean, atol=0.01)
        assert torch.equal(model.hf(input_ids=ids).logits, clean)
    assert [tuple(x.shape[:2]) for x in seen] == [(2, 7), (1, 7)]


# Which sites there are


@pytest.mark.parametrize(
    ("name", "wrapper"),
    [
        *((name, "plain") for name in ALL),
        *((name, "nnsight") for name in ("llama", "phi")),
        *(pytest.param(name, "bridge", marks=pytest.mark.bridge) for name in ("llama", "phi", "bloom")),
    ],
)
def test_each_architecture_accepts_only_its_own_sites(name, wrapper, device):
    model = wrapped(name, wrapper, device)
    for layer in (0, N_LAYERS - 1) if wrapper == "plain" else (2,):
        for point in POINTS:
            if point in points(name):
                check_site(model, Site(layer, point))
                continue
            with pytest.raises(SiteError, match=f"no {point} in block {layer}: .*known here: resid_pre,.* resid_post"):
                check_site(model, Site(layer, point))


REASONS = {
    "granite": r"do not add up|does not add up to what the block hands on \(off by",
    "opt_post_norm": r"does not add up to what the block hands on \(off by",
    "bloom": r"does not add up to what the block hands on \(off by",
    "mpt": r"MptForCausalLM keeps no module of the names known for it",
    "mamba": r"MambaForCausalLM keeps no module of the names known for it \(self_attn",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_missing_sites_raise_with_the_reason(name, device):
    """Every function that takes a site raises it."""
    hf, one = tiny_model(name, device), torch.zeros(1, dtype=torch.long)
    recording = record(hf, prompts(), [Site(1)])
    vectors = recording.at(Site(1), one, one)
    for point in ("attn_out", "resid_mid", "mlp_out"):
        site = Site(1, point)
        for call in (
            lambda site=site: check_site(hf, site),
            lambda site=site: record(hf, prompts(), [site]),
            lambda site=site: measure(recording, site, one, one, vectors, path="hooks"),
            lambda site=site: at_site(wrap(hf), site, lambda x: x).__enter__(),
        ):
            with pytest.raises(SiteError, match=f"no {point} in block 1: .*({REASONS[name]})"):
                call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_scaled_block_outputs_are_rejected_in_a_large_stream(dtype, device):
    """Each block adds half of its modules' outputs to a much larger residual stream: the error still exceeds rounding."""
    hf = fresh("granite", device, dtype)
    hf.model.embed_tokens.weight.mul_(100)
    for layer in (0, 3):
        with pytest.raises(SiteError, match="does not add up"):
            check_site(hf, Site(layer, "attn_out"))


def test_each_block_is_checked_separately(device):
    """A hook changes the output of block 3: only block 3 loses its inner sites."""
    hf = fresh("llama", device)
    hf.model.layers[3].register_forward_hook(lambda _, __, output: output + 0.01)
    for layer in (2, 4):
        check_site(hf, Site(layer, "resid_mid"))
    with pytest.raises(SiteError, match=r"no resid_mid in block 3: .*does not add up"):
        check_site(hf, Site(3, "resid_mid"))
    check_site(hf, Site(3))


def test_an_attention_module_that_is_not_called_is_refused(device):
    hf = fresh("llama", device)
    hf.model.layers[3].mlp.forward = lambda x: x
    block = hf.model.layers[3]
    other = copy.deepcopy(block)
    block.forward = other.forward
    with pytest.raises(SiteError, match="the module taken for attn_out was not called"):
        check_site(hf, Site(3, "attn_out"))


def test_a_block_is_checked_once(device):
    """A deleted model is forgotten. Residual-stream sites need no check of their own in a causal model."""
    hf = fresh("llama", device)
    wrap(hf)
    passes = []
    hf.model.norm.register_forward_hook(lambda *_: passes.append(1))
    for point in STREAM:
        check_site(hf, Site(2, point))
    assert passes == []
    check_site(hf, Site(2, "attn_out"))
    looked = len(passes)
    assert looked == 2
    for point in POINTS:
        check_site(wrap(hf), Site(2, point))
    check_site(hf, Site(2, "mlp_out"), may_run=False)
    assert len(passes) == looked
    with pytest.raises(SiteError, match="block 3 has not been looked at"):
        check_site(hf, Site(3, "mlp_out"), may_run=False)
    check_site(hf, Site(3, "mlp_out"))
    assert len(passes) == 2 * looked
    gone = weakref.ref(hf)
    assert hf in _kinds
    del hf
    gc.collect()
    assert gone() is None


def test_a_layer_that_does_not_exist_raises_at_every_point(device):
    for point in POINTS:
        with pytest.raises(SiteError, match="no block 6 in a model of 6 blocks; layers run from 0 to 5"):
            check_site(tiny_model("llama", device), Site(N_LAYERS, point))


def test_a_refused_block_is_checked_again():
    hf = fresh("llama")
    handle = hf.model.layers[2].register_forward_hook(lambda _, __, out: out + 1)
    with pytest.raises(SiteError, match="does not add up"):
        check_site(hf, Site(2, "mlp_out"))
    handle.remove()
    check_site(hf, Site(2, "mlp_out"))
