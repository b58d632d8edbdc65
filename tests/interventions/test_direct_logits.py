"""Logits of directions, against the final norm and unembedding written out."""

import pytest
import torch

from interventions import Site, intervened_logits, record, wrap
from interventions.direct_logits import direct_logits, extremes, token_text
from tests.tiny import D_MODEL, bridge, fresh, tiny_model, tokenizer

PROMPT = [[4, 8, 15, 16, 23, 42]]


def directions(n: int = 3) -> torch.Tensor:
    return torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(0))


def centred(logits: torch.Tensor) -> torch.Tensor:
    return logits - logits.mean(-1, keepdim=True)


@pytest.mark.parametrize(
    ("name", "gain", "mean_removed", "has_norm"),
    [
        ("llama", lambda hf: hf.model.norm.weight, False, True),
        ("gpt2", lambda hf: hf.transformer.ln_f.weight, True, True),
        ("gemma3", lambda hf: 1 + hf.model.norm.weight, False, True),
        ("opt_post_norm", lambda hf: torch.ones(D_MODEL), True, False),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_direct_logits_match_norm_and_unembedding(name, gain, mean_removed, has_norm):
    hf = tiny_model(name)
    d, size = directions(), 40.0
    through = d - d.mean(1, keepdim=True) if mean_removed and has_norm else d
    scale = D_MODEL**0.5 / size if has_norm else 1.0
    expected = centred(scale * (through * gain(hf)) @ hf.get_output_embeddings().weight.T)
    found = direct_logits(record(hf, PROMPT), d, size)
    # rms² of 50 beside the norm's ε of at most 1e-5, and float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.bridge
def test_bridge_equals_the_plain_model():
    plain = direct_logits(record(tiny_model("llama"), PROMPT), directions(), 20.0)
    bridged = direct_logits(record(wrap(bridge("llama", fresh("llama"))), PROMPT), directions(), 20.0)
    torch.testing.assert_close(plain, bridged, rtol=1e-4, atol=1e-4)


def test_direct_logits_predict_a_small_step_after_the_last_block():
    """The step is orthogonal to x, so the scale of the final norm stays constant."""
    recording = record(tiny_model("llama"), PROMPT)
    last, at = Site(recording.model.n_layers - 1), (torch.tensor([0]), torch.tensor([3]))
    x = recording.at(last, *at)
    d = directions(1)
    d = d - (d @ x[0]) / (x[0] @ x[0]) * x
    step = 0.01 * float(x.norm() / d.norm())
    moved = intervened_logits(recording, last, *at, x + step * d) - intervened_logits(recording, last, *at, x)
    expected = step * direct_logits(recording, d, float(x.norm()))
    torch.testing.assert_close(centred(moved), expected, rtol=0.02, atol=0.01 * float(expected.abs().max()))


def test_extremes_are_the_largest_and_smallest_logits():
    logits = torch.tensor([0.5, -3.0, 2.0, 1.0, -1.0])
    up, down = extremes(logits, 2, tokenizer())
    assert [t.token for t in up] == ["w2", "w3"] and [t.logit for t in up] == [2.0, 1.0]
    assert [t.token for t in down] == ["w1", "w4"] and [t.logit for t in down] == [-3.0, -1.0]
    assert token_text(3, None) == "⟨3⟩"


class Python:
    """A tokenizer written in Python; `unknown` is called for ids that it does not know."""

    unk_token, unk_token_id = "<unk>", 0

    def __init__(self, unknown):
        self.unknown = unknown

    def convert_ids_to_tokens(self, i):
        return ["<unk>", "a", "b"][i] if 0 <= i < 3 else self.unknown(i)

    def decode(self, ids):
        return "".join(self.convert_ids_to_tokens(i) for i in ids)


@pytest.mark.parametrize("unknown", [lambda i: [][i], lambda i: {}[i], lambda i: None, lambda i: "<unk>"])
def test_ids_unknown_to_the_tokenizer_are_shown_as_numbers(unknown):
    """The unembedding can be wider than the tokenizer: by padding, or by tokens added only to the model."""
    assert [token_text(i, Python(unknown)) for i in (0, 1, 2, 3, 99, -1)] == ["<unk>", "a", "b", "⟨3⟩", "⟨99⟩", "–"]
    known = {59: "w59", 60: "⟨60⟩", 96: "⟨96⟩", 10**12: f"⟨{10**12}⟩", -1: "–"}
    assert {i: token_text(i, tokenizer(60)) for i in known} == known


def test_extremes_may_be_ids_beyond_the_tokenizer():
    logits = torch.zeros(97)
    logits[[70, 96]], logits[[3, 80]] = torch.tensor([5.0, 4.0]), torch.tensor([-5.0, -4.0])
    up, down = extremes(logits, 2, tokenizer(60))
    assert [t.token for t in up] == ["⟨70⟩", "⟨96⟩"] and [t.token for t in down] == ["w3", "⟨80⟩"]
