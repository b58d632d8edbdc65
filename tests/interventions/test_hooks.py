"""One edit by each framework's own hooks, against a torch hook set by the test on a plain copy of the model.

A bridge changes the model that it wraps, so every wrapper gets its own copy. Its attention sums in another order:
`tiny.TOLERANCE`.
"""

import pytest
import torch

from interventions import (
    EditError,
    HookError,
    Site,
    SiteError,
    edit_in_trace,
    fwd_hook,
    intervened_logits,
    measure,
    record,
    wrap,
)
from interventions.hooks import edit_at, torch_hook
from tests.tiny import (
    BRIDGED,
    D_MODEL,
    N_LAYERS,
    REPLAYED,
    SITES,
    TOLERANCE,
    all_alone,
    alone,
    assert_same_effect,
    bridge,
    edited,
    exact_kl,
    fresh,
    prompts,
    rows,
    tiny_model,
    traced,
)

CASES = [*((name, Site(2)) for name in BRIDGED), *((name, site) for name in ("llama", "gpt2") for site in SITES)]
CASES = [pytest.param(name, site, id=f"{name}-{site}") for name, site in dict.fromkeys(CASES)]
EVEN = prompts((12, 12, 12))
AT = 7


def rotated(x):
    """An edit that depends on what it is given: numbers shifted by one place, twice as large."""
    return 2 * x.roll(1, dims=-1)


def reference(name, device, site, position=AT):
    hf = tiny_model(name, device)
    at = position if isinstance(position, list) else [position] * len(EVEN)
    return torch.stack([alone(name, hf, ids, site, p, rotated) for ids, p in zip(EVEN, at, strict=True)])


def token_ids(device):
    return torch.tensor(EVEN, device=device)


def close(a, b):
    return (a - b).abs().max() <= TOLERANCE


# The helpers


@pytest.mark.bridge
@pytest.mark.parametrize(("name", "site"), CASES)
def test_fwd_hook_in_a_bridge(name, site, device):
    model = bridge(name, fresh(name, device))
    with fwd_hook(site, rotated, AT) as hook:
        assert hook[0] == site.hook_name
        logits = model.run_with_hooks(token_ids(device), fwd_hooks=[hook])
    assert close(logits[:, AT], reference(name, device, site))
    assert not close(logits[:, AT], model(token_ids(device))[:, AT])


@pytest.mark.parametrize(("name", "site"), CASES)
def test_edit_in_trace_of_nnsight(name, site, device):
    model = traced(fresh(name, device))
    with model.trace(token_ids(device)):
        edit_in_trace(model, site, rotated, AT)
        logits = model.output.logits.save()
    assert close(logits[:, AT], reference(name, device, site))


@pytest.mark.parametrize(("name", "site"), CASES)
def test_torch_hook_on_the_plain_module(name, site, device):
    model = wrap(tiny_model(name, device))
    with torch_hook(model, site, rotated, AT):
        logits = model.hf(input_ids=token_ids(device)).logits
    assert close(logits[:, AT], reference(name, device, site))


POSITIONS = {"one": AT, "from the end": AT - 12, "one each": [3, 11, 0]}


@pytest.mark.bridge
@pytest.mark.parametrize("position", POSITIONS.values(), ids=POSITIONS)
@pytest.mark.parametrize("wrapper", ["plain", "bridge", "nnsight"])
def test_positions(wrapper, position, device):
    """One for all prompts, counted from either end, or one for each."""
    site = Site(2)
    given = torch.tensor(position, device=device) if isinstance(position, list) else position
    logits = run("llama", wrapper, site, rotated, given, device)
    at = position if isinstance(position, list) else [position % 12] * 3
    found = logits[torch.arange(3), torch.tensor(at)]
    assert close(found, reference("llama", device, site, at))


@pytest.mark.bridge
@pytest.mark.parametrize("wrapper", ["plain", "bridge", "nnsight"])
def test_every_position_at_once(wrapper, device):
    """No position: the edit sees `[prompt, pos, d_model]`. Blocks above rotated streams give what they give for these streams."""
    seen = []

    def edit(x):
        seen.append(tuple(x.shape))
        return rotated(x)

    logits = run("llama", wrapper, Site(2), edit, None, device)
    assert seen == [(3, 12, D_MODEL)]
    hf = fresh("llama", device)
    handle = hf.model.layers[3].register_forward_pre_hook(lambda _, args: (rotated(args[0]), *args[1:]))
    expected = hf(input_ids=token_ids(device)).logits
    handle.remove()
    assert close(logits, expected)


def run(name, wrapper, site, edit, position, device, **options):
    """Logits of all positions with `edit` applied, in one of the three frameworks."""
    ids = token_ids(device)
    if wrapper == "plain":
        model = wrap(tiny_model(name, device))
        with torch_hook(model, site, edit, position):
            return model.hf(input_ids=ids).logits
    if wrapper == "bridge":
        model = bridge(name, fresh(name, device))
        with fwd_hook(site, edit, position, **options) as hook:
            return model.run_with_hooks(ids, fwd_hooks=[hook])
    model = traced(fresh(name, device))
    with model.trace(ids):
        edit_in_trace(model, site, edit, position, **options)
        logits = model.output.logits.save()
    return logits


# What raises


def test_a_hook_that_did_not_fire():
    with pytest.raises(HookError, match=r"blocks.2.hook_resid_post did not fire"), fwd_hook(Site(2), rotated, AT):
        pass


def test_a_torch_hook_that_did_not_fire(device):
    with (
        pytest.raises(HookError, match="did not fire"),
        torch_hook(wrap(tiny_model("llama", device)), Site(2), rotated),
    ):
        pass


def test_an_error_inside_is_not_replaced_by_one_of_ours(device):
    for manager in (fwd_hook(Site(2), rotated, AT), torch_hook(wrap(tiny_model("llama", device)), Site(2), rotated)):
        with pytest.raises(KeyError, match="mine"), manager:
            raise KeyError("mine")


@pytest.mark.bridge
def test_a_bridge_that_stops_below_the_hook(device):
    model = bridge("llama", fresh("llama", device))
    with pytest.raises(HookError, match="did not fire"), fwd_hook(Site(4), rotated, AT) as hook:
        model.run_with_hooks(token_ids(device), fwd_hooks=[hook], stop_at_layer=2)


def test_a_layer_that_nnsight_does_not_find(device):
    model = traced(fresh("llama", device))
    with pytest.raises(SiteError, match="no block 6 in a model of 6 blocks"), model.trace(token_ids(device)):
        edit_in_trace(model, Site(N_LAYERS), rotated, AT)


def test_a_layer_that_the_plain_module_does_not_have(device):
    with (
        pytest.raises(SiteError, match="no block 6"),
        torch_hook(wrap(tiny_model("llama", device)), Site(N_LAYERS), rotated),
    ):
        pass


@pytest.mark.parametrize(
    "nothing", [lambda x: x, lambda x: x.clone(), lambda x: x + 0 * x], ids=["same", "copy", "sum"]
)
@pytest.mark.parametrize("wrapper", [pytest.param("bridge", marks=pytest.mark.bridge), "nnsight"])
def test_an_edit_that_changes_nothing(wrapper, nothing, device):
    with pytest.raises(EditError, match=r"the edit at blocks.2.hook_resid_post changed nothing"):
        run("llama", wrapper, Site(2), nothing, AT, device)
    logits = run("llama", wrapper, Site(2), nothing, AT, device, may_change_nothing=True)
    with torch.no_grad():
        clean = tiny_model("llama", device)(input_ids=token_ids(device)).logits
    assert close(logits, clean)


@pytest.mark.parametrize(
    "wrong", [lambda x: x[..., :5], lambda x: x[:1], lambda x: x.mean()], ids=["d", "row", "scalar"]
)
@pytest.mark.parametrize("position", [AT, None], ids=["one", "all"])
@pytest.mark.parametrize("wrapper", ["plain", pytest.param("bridge", marks=pytest.mark.bridge), "nnsight"])
def test_an_edit_of_the_wrong_shape(wrapper, position, wrong, device):
    with pytest.raises(EditError, match=r"the edit gave shape .*expected"):
        run("llama", wrapper, Site(2), wrong, position, device)


def test_nnsight_says_that_a_block_has_run_already(device):
    model = traced(fresh("llama", device))
    with pytest.raises(Exception, match=r"(?i)order|already|missed|out of") as caught, model.trace(token_ids(device)):
        model.model.layers[4].output.save()
        edit_in_trace(model, Site(1), rotated, AT)
        model.output.logits.save()
    assert not isinstance(caught.value, EditError)


def test_edit_at_leaves_its_argument_and_the_dtype(device):
    hidden = torch.randn(2, 5, D_MODEL, device=device).to(torch.bfloat16)
    before = hidden.clone()
    new = edit_at(hidden, lambda x: x.double() + 1, torch.tensor([1, 4]))
    assert torch.equal(hidden, before) and new.dtype == torch.bfloat16
    changed = (new != hidden).any(-1)
    assert changed.nonzero().tolist() == [[0, 1], [1, 4]]


# Parity of what is measured


@pytest.mark.parametrize("wrapper", [pytest.param("bridge", marks=pytest.mark.bridge), "nnsight"])
@pytest.mark.parametrize("name", REPLAYED)
def test_measure_is_the_same_however_the_model_is_wrapped(name, wrapper, device):
    """Both paths, at a site of each point, against each prompt alone in the plain model."""
    hf, tokens, (prompt, position) = tiny_model(name, device), prompts(), rows()
    model = wrap(bridge(name, fresh(name, device)) if wrapper == "bridge" else traced(fresh(name, device)))
    plain = wrap(hf)
    for site in (Site(1, "resid_pre"), Site(3)):
        theirs, mine = record(plain, tokens, [site]), record(model, tokens, [site])
        vectors = edited(theirs, site, prompt, position)
        assert torch.allclose(mine.at(site, prompt, position), theirs.at(site, prompt, position), atol=1e-4, rtol=1e-5)
        slow = all_alone(name, hf, tokens, site, prompt, position, vectors)
        clean = all_alone(name, hf, tokens, site, prompt, position, None)
        for path in ("hooks", "auto"):
            logits = intervened_logits(mine, site, prompt, position, vectors, path=path)
            assert close(logits, slow)
            effects = measure(mine, site, prompt, position, vectors, metrics=("kl", "top1_changed"), path=path)
            assert effects.path == ("hooks" if path == "hooks" else "replay")
            assert_same_effect(effects["kl"], exact_kl(clean, slow), TOLERANCE)
            assert torch.equal(effects["top1_changed"], (slow.argmax(-1) != clean.argmax(-1)).cpu())


@pytest.mark.bridge
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_users_bridge_hooks_fire_during_replay(name, device):
    """On the blocks that replay runs, not on those it skips; and what they change counts."""
    handle = bridge(name, fresh(name, device))
    site, (prompt, position) = Site(2), rows()
    recording = record(handle, prompts(), [site])
    vectors = edited(recording, site, prompt, position)
    untouched = measure(recording, site, prompt, position, vectors)["kl"]
    calls = {layer: 0 for layer in range(N_LAYERS)}

    def count(tensor, hook):
        calls[int(hook.name.split(".")[1])] += 1
        return tensor

    for layer in calls:
        handle.add_hook(f"blocks.{layer}.hook_resid_post", count)
    counted = measure(recording, site, prompt, position, vectors)["kl"]
    assert torch.equal(counted, untouched)
    assert [calls[layer] for layer in range(N_LAYERS)] == [0, 0, 0, 1, 1, 1]
    handle.reset_hooks()
    handle.add_hook("blocks.4.hook_resid_post", lambda tensor, hook: 0.5 * tensor)
    assert not torch.allclose(measure(recording, site, prompt, position, vectors)["kl"], untouched, atol=1e-3)
    handle.reset_hooks()
    assert torch.equal(measure(recording, site, prompt, position, vectors)["kl"], untouched)


@pytest.mark.parametrize("wrapper", [pytest.param("bridge", marks=pytest.mark.bridge), "nnsight"])
@pytest.mark.parametrize("site", [Site(0, "resid_pre"), Site(2), Site(N_LAYERS - 1)], ids=str)
def test_a_wrapped_model_is_left_as_it_was(wrapper, site, device):
    handle = bridge("llama", fresh("llama", device)) if wrapper == "bridge" else traced(fresh("llama", device))
    model = wrap(handle)
    ids = token_ids(device)
    with torch.no_grad():
        before = model.hf(input_ids=ids).logits
    forwards = {name: module.__dict__.get("forward") for name, module in model.hf.named_modules()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules()]
    recording = record(model, prompts(), [site])
    prompt, position = rows()
    for path in ("auto", "hooks"):
        measure(recording, site, prompt, position, edited(recording, site, prompt, position), path=path)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules()]
    for name, module in model.hf.named_modules():
        assert module.__dict__.get("forward") == forwards[name]
    with torch.no_grad():
        assert torch.equal(model.hf(input_ids=ids).logits, before)
