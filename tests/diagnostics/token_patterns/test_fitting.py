"""Patterns of planted activations, the search in stages against one length after the other, and probes against full passes."""

import numpy as np
import torch

from diagnostics.token_patterns.fitting import Example, ModelProbe, fit_patterns
from diagnostics.token_patterns.tries import ANY
from interventions import Site
from interventions.models.wrapping import wrap
from tests.tiny import prompts, tiny_model

PAD = 0


def test_planted_pattern_with_a_wildcard_is_found():
    def fires(sequences):  # "5, any, 7"; and twice as strong after a 9, six tokens back
        z = [(len(s) > 2 and s[-1] == 7 and s[-3] == 5) * (1.0 + (len(s) > 6 and s[-7] == 9)) for s in sequences]
        return np.array(z)

    plain, strong = (3, 3, 3, 3, 5, 6, 7), (9, 3, 3, 3, 5, 6, 7)
    found = fit_patterns([Example(plain, 1.0, PAD), Example(strong, 2.0, PAD)], fires, PAD, longest=8)
    assert found.patterns == {(7, ANY, 5): 2} and not found.no_suffix  # half of 2 needs no 9
    # .9 of the activation needs the 9, so that no suffix of 5 tokens keeps half
    found = fit_patterns([Example(strong, 2.5, PAD)], fires, PAD, longest=5)
    assert not found.patterns and found.no_suffix == 1
    found = fit_patterns([Example(plain, 1.0, PAD)], lambda s: np.ones(len(s)), PAD, longest=5)
    assert not found.patterns and found.no_token == 1  # it fires whatever the token


def test_staged_search_matches_one_length_at_a_time():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(12, 40))

    def linear(sequences):
        return np.array([sum(weight[i, t] for i, t in enumerate(s[::-1][:12])) for s in sequences])

    examples = []
    for _ in range(80):
        tokens = tuple(rng.integers(1, 40, rng.integers(1, 20)).tolist())
        z = linear([tokens])[0]
        examples.append(Example(tokens, float(z if abs(z) > 0.1 else 1.0), PAD))
    calls = []
    found = fit_patterns(examples, lambda s: calls.append(len(s)) or linear(s), PAD, longest=9)
    by_hand, none = {}, 0
    for e in examples:
        lengths = range(1, min(9, len(e.tokens)) + 1)
        n = next((n for n in lengths if linear([(PAD, *e.tokens[-n:])])[0] / e.z >= 0.5), None)
        if n is None:
            none += 1
            continue
        suffix, own = e.tokens[-n:], linear([(PAD, *e.tokens[-n:])])[0]
        kept = [linear([(PAD, *suffix[:i], PAD, *suffix[i + 1 :])])[0] / own > 0.5 for i in range(n)]
        pattern = tuple(ANY if k else t for t, k in zip(suffix, kept, strict=True))[::-1]
        if not all(kept):
            by_hand[pattern] = by_hand.get(pattern, 0) + 1
    assert found.patterns == by_hand and found.no_suffix == none > 0
    assert len(calls) == 3  # lengths to 4, to 9, and the replacements


def test_probe_matches_the_last_token_of_a_full_pass():
    hf, site, row = tiny_model("llama"), Site(3), torch.randn(32, generator=torch.Generator().manual_seed(0))
    probe = ModelProbe(wrap(hf), site, lambda x: x @ row)
    sequences = [tuple(tokens) for tokens in prompts()] * 2
    seen = []
    handle = hf.model.layers[3].register_forward_hook(
        lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    for s in sequences[:5]:
        hf(input_ids=torch.tensor([s]))
    handle.remove()
    by_hand = [float(x.reshape(-1, 32)[-1] @ row) for x in seen]
    assert np.allclose(probe(sequences), by_hand * 2, rtol=1e-4, atol=1e-4)
    assert probe.tokens == sum(len(s) for s in sequences[:5]) and probe.passes >= 1
