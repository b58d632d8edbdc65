"""What a recording keeps, against the plain model's own hidden states.

Tolerance: batches of other shapes may sum in another order; activations are of order 10 and rounded to 1e-6 of that a few
hundred times, so 1e-4.
"""

import pytest
import torch

from interventions import Site, SiteError, TextError, record, wrap
from tests import tiny
from tests.tiny import D_MODEL, N_LAYERS, TOLERANCE, VOCAB, fresh, prompts, tiny_model

PRE = Site(2, "resid_pre")


@pytest.mark.parametrize(("name", "batch_prompts"), [("llama", 1), ("llama", 2), ("gemma3", 3), ("gpt2", 2)])
def test_batch_size_does_not_change_recordings(name, batch_prompts, device):
    """Compared at the prompts' own tokens, not at padding."""
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


def test_recorded_tensors_can_be_trained_on(device):
    """They have no graph and are no inference tensors: a probe can be trained on them, and gradients taken through them."""
    hf = fresh("llama", device).requires_grad_(True)
    recording = record(hf, prompts(), [PRE])
    for tensor in (recording.activations[PRE], recording.final_hidden, *recording.keys, *recording.values):
        assert not tensor.requires_grad and tensor.grad_fn is None and not tensor.is_inference()
    weight = torch.zeros(D_MODEL, device=device, requires_grad=True)
    (recording.activations[PRE] @ weight).square().mean().sub(1).mul(recording.final_hidden.sum()).backward()
    assert weight.grad is not None
    assert all(p.grad is None for p in hf.parameters())


# Errors


def test_an_unrecorded_site_raises(device):
    recording = record(tiny_model("llama", device), prompts(), [PRE])
    with pytest.raises(SiteError, match=r"site 3.resid_post was not recorded; recorded: 2.resid_pre"):
        recording.at(Site(3), torch.tensor([0]), torch.tensor([0]))


@pytest.mark.parametrize("tokens", [[], [[]], [[1, 2], []]], ids=str)
def test_empty_prompts_raise(tokens, device):
    with pytest.raises(TextError, match="empty"):
        record(tiny_model("llama", device), tokens)


@pytest.mark.parametrize("many", [0, -1])
def test_passes_without_a_prompt_raise(many):
    with pytest.raises(TextError, match=f"batch_prompts = {many}; expected 1 or more"):
        record(tiny_model("llama"), [[1, 2]], batch_prompts=many)


@pytest.mark.parametrize("bad", [VOCAB, -1])
def test_ids_outside_the_vocabulary_raise(bad, device):
    with pytest.raises(TextError, match=f"token id {bad} is outside the vocabulary of {VOCAB}"):
        record(tiny_model("llama", device), [[1, 2], [3, bad, 4]])


def test_text_and_site_names_record_the_same_as_lists(device):
    model, site = wrap(fresh("llama", device), tiny.tokenizer()), Site(2, "mlp_out")
    expected = record(model, [[5, 6, 7]], [site]).of(site)
    for name in ("2.mlp_out", "blocks.2.hook_mlp_out", site):
        assert torch.equal(record(model, "w5 w6 w7", name).of(name), expected)
    assert record(model, "w5 w6 w7", name).has("2.mlp_out")
    with pytest.raises(TextError, match=r"wrap\(model, tokenizer\)"):
        record(model.hf, "w5 w6 w7", name)
