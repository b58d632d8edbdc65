"""Replay must be right or be refused, whatever a user put on the model. Right values: each prompt alone, with a plain torch hook."""

import copy
import functools
import warnings

import pytest
import torch

from interventions import Site, measure, record, wrap
from interventions.replaying.replay_check import logits_differ
from tests.tiny import exact_kl, fresh, llama, noise, prompts

SITE = Site(1)


def alone(hf, tokens, pairs, block=None, among=slice(None), *, forgetful=False):
    """KL of each row, nats, over the tokens `among`: the block's output times 1.5, one plain pass over the row's whole prompt.

    forgetful: each pass is a copy's, for a dynamic rotary embedding remembers longer passes.
    """
    block, known = hf.model.layers[1] if block is None else block, {}

    def logits(ids, position):
        run = copy.deepcopy(hf) if forgetful else hf
        return run(input_ids=ids, use_cache=False).logits[:, position, among].double()

    for p, position in dict.fromkeys(pairs):

        def scale(_, __, out, position=position):
            (out[0] if isinstance(out, tuple) else out)[:, position] *= 1.5

        ids = torch.tensor([tokens[p]])
        clean = logits(ids, position)
        handle = block.register_forward_hook(scale)
        known[p, position] = exact_kl(clean, logits(ids, position))[0]
        handle.remove()
    return torch.tensor([known[pair] for pair in pairs])


def measured(hf, tokens, pairs, **options):
    """KL of each row by `measure`, what it says of its path, and how often it warned."""
    recording = record(hf, tokens, [SITE])
    prompt, position = (torch.tensor(x) for x in zip(*pairs, strict=True))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        effects = measure(recording, SITE, prompt, position, 1.5 * recording.at(SITE, prompt, position), **options)
    return effects, [str(w.message) for w in caught]


def assert_right(effects, expected, rtol=2e-3):
    assert torch.allclose(effects["kl"].double(), expected.double(), rtol=rtol, atol=1e-6), (effects, expected)


# Rotary frequencies that depend on length


ROPES = {
    "dynamic": {
        "max_position_embeddings": 12,
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    },
    "longrope": {
        "max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "factor": 4.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 2.0, 4.0, 8.0],
            "original_max_position_embeddings": 12,
        },
    },
}


@pytest.mark.parametrize(
    ("rope", "lengths"),
    [("dynamic", (24, 10)), ("dynamic", (10, 13, 24)), ("longrope", (24, 10)), ("longrope", (10, 12))],
)
def test_rotary_frequencies_equal_those_of_single_prompts(rope, lengths):
    hf, tokens = llama(**ROPES[rope]), prompts(lengths)
    pairs = [(p, position) for p, n in enumerate(lengths) for position in (3, n - 1)]
    expected = alone(hf, tokens, pairs, forgetful=True)
    for batch_rows in (1, None):
        effects, warned = measured(hf, tokens, pairs, batch_rows=batch_rows)
        assert_right(effects, expected)
        long = max(lengths) > 12
        assert effects.path == ("hooks" if long else "replay")
        assert [message for message in warned if rope in message] == (warned if long else [])
    recording = record(hf, tokens, [SITE])
    for p, ids in enumerate(tokens):
        own = record(copy.deepcopy(hf), [ids], [SITE])
        assert torch.allclose(recording.activations[SITE][p, : len(ids)], own.activations[SITE][0], atol=1e-5)


def test_earlier_longer_pass_changes_nothing():
    hf, tokens = llama(**ROPES["dynamic"]), prompts((16,))
    expected = alone(hf, tokens, [(0, 5)], forgetful=True)
    hf(input_ids=torch.tensor(prompts((40,))))
    assert_right(measured(hf, tokens, [(0, 5)])[0], expected)


# Logits that the model pins


@pytest.mark.parametrize(
    ("kind", "pinned"), [("mpt", -1e9), ("mpt", float("-inf")), ("gpt_neo", -1e4), ("llama", float("-inf"))]
)
def test_pinned_logits_do_not_widen_the_tolerance(kind, pinned):
    hf, tokens, pairs = fresh(kind), prompts((24, 17)), [(0, 3), (0, 23), (1, 9)]
    head = hf.get_output_embeddings()
    bias = torch.zeros(97)
    bias[[1, 5, 40, 41, 96]] = pinned
    head.bias = torch.nn.Parameter(bias, requires_grad=False)
    expected = alone(hf, tokens, pairs, wrap(hf).blocks[1], bias == 0)
    effects, _ = measured(hf, tokens, pairs)
    assert_right(effects, expected)
    assert effects.path == ("replay" if kind == "llama" else "hooks")


def test_wrong_logits_are_detected_beside_pinned_ones():
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(3, 50, generator=generator)
    logits[:, :4] = torch.tensor([-1e9, float("-inf"), -1e4, -200.0])
    slight = logits + 1e-6 * torch.randn(3, 50, generator=generator)
    delta, allowed = logits_differ(slight, logits, torch.float32)
    assert delta < 1e-5 < allowed < 1e-3
    for token, value in ((10, float(logits[1, 10]) + 0.01), (0, 0.0), (1, -1.0), (2, -2e4), (3, float("nan"))):
        wrong = slight.clone()
        wrong[1, token] = value
        delta, allowed = logits_differ(wrong, logits, torch.float32)
        assert delta > allowed, token


# Code of the user's own


def add_at(where):
    vector = 3 * noise(1)[0]

    def hook(_, __, out):
        (out[0] if isinstance(out, tuple) else out)[where] += vector

    return hook


def mixed(_, __, out):
    """Each token beside the one before it; what mixes in later tokens makes a model that is not causal."""
    out = out[0] if isinstance(out, tuple) else out
    return torch.cat([out[:, :1], out[:, 1:] + 0.5 * out[:, :-1]], dim=1)


def first_prompt_only(_, __, out):
    (out[0] if isinstance(out, tuple) else out)[0, 3] *= 2


HOOKS = {
    "last token": add_at((slice(None), -1)),
    "third token": add_at((slice(None), 2)),
    "a stretch": add_at((slice(None), slice(100, 200))),
    "the end but one": add_at((slice(None), slice(-4, -1))),
    "every token": add_at((slice(None),)),
    "two tokens": mixed,
    "first prompt of a batch": first_prompt_only,
}


@pytest.mark.parametrize(
    ("name", "patched"), [*((name, False) for name in HOOKS), ("last token", True), ("two tokens", True)]
)
def test_user_hooks_and_forwards_act_as_in_a_plain_pass(name, patched):
    hook, hf, tokens = HOOKS[name], llama(), prompts((24, 10, 24))
    pairs = [*((0, p) for p in (2, 3, 20, 23)), (1, 9), (1, 3), *((2, p) for p in range(0, 24, 3))]
    block = hf.model.layers[2]
    if patched:
        own = block.forward

        def forward(*args, **kwargs):
            out = own(*args, **kwargs)
            given = hook(block, args, out)
            return out if given is None else given

        block.forward = forward
    else:
        block.register_forward_hook(hook)
    expected = alone(hf, tokens, pairs)
    n = 14 if name in ("last token", "a stretch") else 2  # rows enough that the stretch lies within one pass
    assert_right(measured(hf, tokens, pairs * n)[0], expected.repeat(n))
    assert_right(measured(hf, tokens, pairs, path="hooks")[0], expected)
    if name == "every token":
        assert measured(hf, tokens, pairs)[0].path == "replay"


def steer(out):
    """A strong change of every token."""
    return (out[0] if isinstance(out, tuple) else out) + 0.5 * torch.linspace(-1, 1, 32)


WHEN = {
    "more than a token": lambda x: x.shape[1] > 1,
    "a single token": lambda x: x.shape[1] == 1,
    "a short pass": lambda x: x.shape[1] <= 16,
    "a long pass": lambda x: x.shape[1] >= 20,
}


@pytest.mark.parametrize("when", WHEN.values(), ids=WHEN)
def test_hooks_that_count_tokens_act_as_on_whole_prompts(when):
    hf, tokens = llama(), prompts((24, 10, 24, 12))
    pairs = [(0, 3), (0, 23), (1, 9), (2, 7), (2, 11), (3, 5)]
    hf.model.layers[2].register_forward_hook(lambda _, __, out: steer(out) if when(out) else out)
    expected = alone(hf, tokens, pairs)
    for some, batch_rows in ((pairs, None), (pairs[:2], 1), (pairs[:1], None), (pairs[2:3], None)):
        effects, warned = measured(hf, tokens, some, batch_rows=batch_rows)
        assert_right(effects, torch.stack([expected[pairs.index(pair)] for pair in some]))
        assert bool(warned) == (effects.path == "hooks")


@pytest.mark.parametrize("where", ["embedding", "position"])
def test_hooks_that_look_at_tokens_act_as_on_whole_prompts(where):
    hf, tokens, seen = llama(), prompts((24, 17)), {}
    tokens[1][9] = tokens[0][3]
    pairs = [(0, 2), (0, 3), (0, 20), (1, 9), (1, 16)]
    if where == "embedding":
        hf.model.embed_tokens.register_forward_hook(lambda _, args, __: seen.update(at=args[0] == tokens[0][3]))
    else:
        hf.model.register_forward_pre_hook(
            lambda _, __, kwargs: seen.update(at=torch.arange(kwargs["input_ids"].shape[1])[None] % 7 == 2),
            with_kwargs=True,
        )
    hf.model.layers[2].register_forward_hook(lambda _, __, out: torch.where(seen["at"][..., None], steer(out), out))
    assert_right(measured(hf, tokens, pairs)[0], alone(hf, tokens, pairs))


@pytest.mark.parametrize("when", [lambda x: len(x) == 1, lambda x: x.shape[1] > 8])
def test_wrapped_forward_counts_as_user_code(when):
    hf, tokens = llama(), prompts((24, 10, 24))
    pairs = [*((0, p) for p in range(20, 24)), (1, 9), (2, 20), (2, 3)]
    own = hf.model.layers[2].mlp.forward

    @functools.wraps(own)
    def forward(x):
        return steer(own(x)) if when(x) else own(x)

    hf.model.layers[2].mlp.forward = forward
    assert record(hf, tokens).own_code == ("model.layers.2.mlp",)
    assert_right(measured(hf, tokens, pairs)[0], alone(hf, tokens, pairs))


@pytest.mark.parametrize("before", [False, True], ids=["after the block", "before the block"])
def test_sweep_over_sites_is_exact_around_a_user_hook(before):
    hf, tokens = llama(), prompts((24, 17))
    pairs = [(0, 2), (0, 23), (1, 9), (1, 16)]
    if before:
        hf.model.layers[2].register_forward_pre_hook(lambda _, args: (steer(args[0]), *args[1:]))
    else:
        hf.model.layers[2].register_forward_hook(lambda _, __, out: steer(out))
    sites = [Site(layer) for layer in range(4)]
    recording, (prompt, position) = record(hf, tokens, sites), (torch.tensor(x) for x in zip(*pairs, strict=True))
    for site in sites:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            effects = measure(recording, site, prompt, position, 1.5 * recording.at(site, prompt, position))
        assert_right(effects, alone(hf, tokens, pairs, hf.model.layers[site.layer]))
        assert effects.path == ("hooks" if site.layer == 2 and not before else "replay")


@pytest.mark.parametrize(
    ("where", "gate"),
    [
        ("lm_head", lambda x: x.shape[1] >= 8),
        ("model.norm", lambda x: x.shape[1] > 1),
        ("lm_head", lambda x: x.shape[1] < 30),
    ],
)
def test_token_counting_hooks_at_the_unembedding_are_exact(where, gate):
    hf, tokens, pairs = llama(), prompts((24, 17)), [(0, 3), (1, 4)]
    hf.get_submodule(where).register_forward_hook(lambda _, __, out: out * 1.5 if gate(out) else out)
    expected = alone(hf, tokens, pairs)
    for some in (pairs, pairs[:1], pairs * 10):
        effects, _ = measured(hf, tokens, some, metrics=("kl", "kl_direct"))
        assert_right(effects, torch.stack([expected[pairs.index(pair)] for pair in some]))
        direct = measured(hf, tokens, some, metrics=("kl", "kl_direct"), path="hooks")[0]["kl_direct"]
        assert torch.allclose(effects["kl_direct"], direct, rtol=2e-3, atol=1e-6)


def test_a_hook_that_changes_a_block_in_place_acts_once():
    hf, tokens, pairs = llama(), prompts((24, 17)), [(0, 3), (0, 23), (1, 4)]
    hf.model.layers[0].register_forward_hook(add_at((slice(None),)))
    expected = alone(hf, tokens, pairs)
    effects, _ = measured(hf, tokens, pairs, metrics=("kl", "kl_direct"))
    assert effects.path == "replay"
    assert_right(effects, expected)
    direct = measured(hf, tokens, pairs, metrics=("kl", "kl_direct"), path="hooks")[0]["kl_direct"]
    assert torch.allclose(effects["kl_direct"], direct, rtol=2e-3, atol=1e-6)
