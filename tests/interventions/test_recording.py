"""What a recording keeps, against the plain model's own hidden states.

Tolerance: batches of other shapes may sum in another order; activations are of order 10 and rounded to 1e-6 of that a few
hundred times, so 1e-4.
"""

import pytest
import torch

from interventions import Site, SiteError, TextError, record
from interventions.texts import as_prompts
from tests.tiny import D_MODEL, N_LAYERS, REPLAYED, TOLERANCE, VOCAB, fresh, prompts, recorded, tiny_model

PRE = Site(2, "resid_pre")


@pytest.mark.parametrize("name", [*REPLAYED, "gpt_neo", "bloom", "mpt"])  # mamba counts its hidden states otherwise
def test_activations_are_the_models_hidden_states(name, device):
    """`hidden_states[l]` is what block l reads; what the last block hands on comes out through the final norm."""
    hf, tokens = tiny_model(name, device), prompts()
    sites = [Site(layer, point) for layer in (0, 3, N_LAYERS - 1) for point in ("resid_pre", "resid_post")]
    recording = record(hf, tokens, sites)
    for i, ids in enumerate(tokens):
        with torch.no_grad():
            output = hf.base_model(input_ids=torch.tensor([ids], device=device), output_hidden_states=True)
        for site in sites:
            mine = recording.activations[site][i, : len(ids)]
            if site.first_block < N_LAYERS:
                assert torch.allclose(mine, output.hidden_states[site.first_block][0], atol=TOLERANCE, rtol=1e-5)
        assert torch.allclose(recording.final_hidden[i, : len(ids)], output[0][0], atol=TOLERANCE, rtol=1e-5)
    last = recording.activations[Site(N_LAYERS - 1)]
    assert not torch.allclose(last[0], recording.activations[Site(N_LAYERS - 1, "resid_pre")][0], atol=0.1)


def test_prompts_are_their_tokens(device):
    hf = tiny_model("llama", device)
    recording, bare = record(hf, as_prompts(prompts(), None), [PRE]), record(hf, prompts(), [PRE])
    assert torch.equal(recording.tokens, bare.tokens)
    assert torch.equal(recording.activations[PRE], bare.activations[PRE])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_final_norm_reads_the_last_site(name, device):
    last = Site(N_LAYERS - 1)
    recording = recorded(name, last, device=device)
    base = recording.model.base
    norm = base.norm if name == "llama" else base.ln_f
    assert torch.allclose(norm(recording.activations[last]), recording.final_hidden, atol=TOLERANCE, rtol=1e-5)


@pytest.mark.parametrize(("name", "batch_prompts"), [("llama", 1), ("llama", 2), ("gemma3", 3), ("gpt2", 2)])
def test_batches_do_not_change_what_is_recorded(name, batch_prompts, device):
    """On the prompts' own tokens; beyond them stands padding."""
    hf, tokens = tiny_model(name, device), prompts((3, 24, 10, 1, 17))
    expected = record(hf, tokens, [PRE])
    found = record(hf, tokens, [PRE], batch_prompts=batch_prompts)
    assert torch.equal(found.tokens, expected.tokens)
    for i, ids in enumerate(tokens):
        own = slice(0, len(ids))
        pairs = [(found.final_hidden, expected.final_hidden), (found.activations[PRE], expected.activations[PRE])]
        for a, b in pairs:
            assert a.shape == b.shape
            assert torch.allclose(a[i, own], b[i, own], atol=TOLERANCE, rtol=1e-5)
        for kept, wanted in ((found.keys, expected.keys), (found.values, expected.values)):
            assert len(kept) == N_LAYERS
            for a, b in zip(kept, wanted, strict=True):
                assert a.shape == b.shape
                assert torch.allclose(a[i, :, own], b[i, :, own], atol=TOLERANCE, rtol=1e-5)


def test_keys_and_values_beyond_a_window_are_kept(device):
    recording = record(tiny_model("mistral_window", device), prompts())
    assert {k.shape[2] for k in (*recording.keys, *recording.values)} == {24}


def test_a_recording_without_keys(device):
    with_keys = record(tiny_model("llama", device), prompts(), [PRE])
    without = record(tiny_model("llama", device), prompts(), [PRE], keep_cache=False)
    assert without.keys is None and without.values is None
    assert torch.allclose(without.activations[PRE], with_keys.activations[PRE], atol=TOLERANCE)


def test_tensors_without_mask_are_whole_prompts(device):
    ids = torch.tensor(prompts((7, 7)), device=device)
    recording = record(tiny_model("gpt2", device), ids)
    assert recording.length.tolist() == [7, 7] and torch.equal(recording.tokens, ids)


def test_at_gives_single_tokens(device):
    recording = record(tiny_model("llama", device), prompts(), [PRE])
    prompt, position = torch.tensor([3, 0, 3]), torch.tensor([23, 0, 1])
    found = recording.at(PRE, prompt, position)
    assert found.shape == (3, D_MODEL)
    for i in range(3):
        assert torch.equal(found[i], recording.activations[PRE][prompt[i], position[i]])


def test_recorded_tensors_can_be_trained_on(device):
    """No graph is kept, and nothing is an inference tensor: a probe can be fitted to it, a gradient taken through it."""
    hf = fresh("llama", device).requires_grad_(True)
    recording = record(hf, prompts(), [PRE])
    for tensor in (recording.activations[PRE], recording.final_hidden, *recording.keys, *recording.values):
        assert not tensor.requires_grad and tensor.grad_fn is None and not tensor.is_inference()
    weight = torch.zeros(D_MODEL, device=device, requires_grad=True)
    (recording.activations[PRE] @ weight).square().mean().sub(1).mul(recording.final_hidden.sum()).backward()
    assert weight.grad is not None
    assert all(p.grad is None for p in hf.parameters())


def test_a_model_keeps_no_hook_after_recording(device):
    hf = fresh("llama", device)
    record(hf, prompts(), [PRE, Site(0)])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in hf.modules())


# Errors


def test_an_unrecorded_site_raises(device):
    recording = record(tiny_model("llama", device), prompts(), [PRE])
    with pytest.raises(SiteError, match=r"site 3.resid_post was not recorded; recorded: 2.resid_pre"):
        recording.at(Site(3), torch.tensor([0]), torch.tensor([0]))


def test_a_layer_that_does_not_exist_raises(device):
    with pytest.raises(SiteError, match="no block 6 in a model of 6 blocks; layers run from 0 to 5"):
        record(tiny_model("llama", device), prompts(), [Site(6)])


@pytest.mark.parametrize(
    ("prompt", "position", "message"),
    [
        ([5], [0], "prompt 5 does not exist"),
        ([-1], [0], "prompt"),
        ([0, 1], [3, 10], "position 10 lies outside prompt 1, which has 10 tokens"),
        ([4], [1], "position 1 lies outside prompt 4, which has 1 tokens"),
        ([0], [-1], "position -1"),
        ([], [], "no rows"),
    ],
)
def test_rows_outside_their_prompts_raise(prompt, position, message, device):
    recording = record(tiny_model("llama", device), prompts(), [PRE])
    with pytest.raises(SiteError, match=message):
        recording.at(PRE, torch.tensor(prompt, dtype=torch.long), torch.tensor(position, dtype=torch.long))


@pytest.mark.parametrize("tokens", [[], [[]], [[1, 2], []]], ids=str)
def test_empty_prompts_raise(tokens, device):
    with pytest.raises(TextError, match="empty"):
        record(tiny_model("llama", device), tokens)


@pytest.mark.parametrize("bad", [VOCAB, -1])
def test_ids_outside_the_vocabulary_raise(bad, device):
    with pytest.raises(TextError, match=f"token id {bad} is outside the vocabulary of {VOCAB}"):
        record(tiny_model("llama", device), [[1, 2], [3, bad, 4]])
