"""One edit by each framework's own hooks, against a torch hook set by the test on a plain copy of the model.

A bridge changes the model that it wraps, so every wrapper gets its own copy. Its attention sums in another order:
`tiny.TOLERANCE`.
"""

import pytest
import torch

from interventions import (
    EditError,
    HookError,
    ModelError,
    Site,
    SiteError,
    check_site,
    edit_in_trace,
    fwd_hooks,
    intervened_logits,
    measure,
    record,
    wrap,
)
from interventions.replaying.hooks import edit_at, torch_hook
from interventions.sites import POINTS
from tests.tiny import (
    BRIDGED,
    D_MODEL,
    LAYERS,
    N_LAYERS,
    PARALLEL,
    REPLAYED,
    TOLERANCE,
    all_alone,
    alone,
    assert_same_effect,
    bridge,
    edited,
    exact_kl,
    forward_alone,
    fresh,
    points,
    points_by_turns,
    prompts,
    rows,
    several,
    sites,
    tiny_model,
    traced,
    within,
    wrapped,
)

# Every point of llama and gpt2 in each framework; elsewhere one, another in each framework. Blocks by turns.
CASES = [
    pytest.param(
        wrapper,
        name,
        Site(LAYERS[i % 3], point),
        id=f"{wrapper}-{name}-{point}",
        marks=[pytest.mark.bridge] if wrapper == "bridge" else [],
    )
    for turn, wrapper in enumerate(("plain", "bridge", "nnsight"))
    for i, (name, point) in enumerate(points_by_turns(*BRIDGED, turn=turn))
]
WRAPPERS = ["plain", pytest.param("bridge", marks=pytest.mark.bridge), "nnsight"]
EVEN = prompts((12, 12, 12))
AT = 7


def rotated(x):
    """An edit that depends on what it is given: numbers shifted by one place, twice as large."""
    return 2 * x.roll(1, dims=-1)


def reference(name, device, site, position=AT):
    """Logits from the edited position on; where each prompt has its own: there."""
    hf = tiny_model(name, device)
    if isinstance(position, list):
        return torch.stack([alone(name, hf, ids, site, p, rotated) for ids, p in zip(EVEN, position, strict=True)])
    return torch.stack([forward_alone(name, hf, ids, site, {position: rotated})[position:] for ids in EVEN])


def token_ids(device):
    return torch.tensor(EVEN, device=device)


def close(a, b):
    return (a - b).abs().max() <= TOLERANCE


# The helpers


@pytest.mark.parametrize(("wrapper", "name", "site"), CASES)
def test_hooks_of_each_framework_equal_a_plain_torch_hook(wrapper, name, site, device):
    expected = reference(name, device, site)
    logits = run(name, wrapper, site, rotated, AT, device)
    assert close(logits[:, AT:], expected)
    with torch.no_grad():
        clean = tiny_model(name, device)(input_ids=token_ids(device)).logits
    assert close(logits[:, :AT], clean[:, :AT]) and not close(expected, clean[:, AT:])


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("point", points("llama"))
def test_an_edit_without_position_sees_every_position(point, wrapper, device):
    """At `resid_mid` an edit sees the residual stream, not the attention output that is added to it."""
    seen, site = [], Site(2, point)

    def edit(x):
        seen.append(x.clone())
        return 2 * x

    run("llama", wrapper, site, edit, None, device)
    expected = record(tiny_model("llama", device), EVEN, [site]).activations[site]
    assert torch.allclose(seen[-1], expected, atol=TOLERANCE, rtol=1e-5)


POSITIONS = {"one": AT, "from the end": AT - 12, "one each": [3, 11, 0]}


@pytest.mark.parametrize("position", POSITIONS.values(), ids=POSITIONS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_positions_may_be_negative_or_one_per_prompt(wrapper, position, device):
    site = Site(2)
    given = torch.tensor(position, device=device) if isinstance(position, list) else position
    logits = run("llama", wrapper, site, rotated, given, device)
    at = position if isinstance(position, list) else [position % 12] * 3
    found = logits[torch.arange(3), torch.tensor(at)]
    assert close(found, reference("llama", device, site, at))


def run(name, wrapper, site, edit, position, device, **options):
    """Logits of all positions with `edit` applied, in one of the three frameworks."""
    ids, model = token_ids(device), wrapped(name, wrapper, device)
    if wrapper == "plain":
        model = wrap(model)
        with torch.no_grad(), torch_hook(model, site, edit, position):
            return model.hf(input_ids=ids).logits
    if wrapper == "bridge":
        with fwd_hooks(site, edit, position, **options) as hooks:
            return model.run_with_hooks(ids, fwd_hooks=hooks)
    check_site(model, site)
    with model.trace(ids):
        edit_in_trace(model, site, edit, position, **options)
        logits = model.output.logits.save()
    return logits


# What raises


def test_a_hook_that_did_not_fire_raises(device):
    with pytest.raises(HookError, match=r"blocks.2.hook_resid_post did not fire"), fwd_hooks(Site(2), rotated, AT):
        pass
    for site in sites("llama", (2,)):
        with (
            pytest.raises(HookError, match=f"the hook at {site} did not fire"),
            torch_hook(wrap(tiny_model("llama", device)), site, rotated),
        ):
            pass


@pytest.mark.bridge
@pytest.mark.parametrize("site", [Site(2, "resid_mid"), Site(2, "attn_out"), Site(4)], ids=str)
def test_a_bridge_that_stops_before_the_hook_raises(site, device):
    model = wrapped("llama", "bridge", device)
    with pytest.raises(HookError, match="did not fire"), fwd_hooks(site, rotated, AT) as hooks:
        model.run_with_hooks(token_ids(device), fwd_hooks=hooks, stop_at_layer=2)


# Sites that are not there


@pytest.mark.parametrize("name", PARALLEL)
def test_parallel_blocks_have_no_resid_mid_on_any_path(name, device):
    site = Site(2, "resid_mid")
    message = f"no resid_mid in block 2: attention and MLP of {type(tiny_model(name, device)).__name__} read the same"
    model = wrapped(name, "nnsight", device)
    recording = record(model, EVEN, [Site(2, "attn_out")])
    one = torch.zeros(1, dtype=torch.long)
    for call in (
        lambda: record(model, EVEN, [site]),
        lambda: measure(recording, site, one, one, torch.zeros(1, D_MODEL, device=device)),
        lambda: intervened_logits(recording, site, one, one, torch.zeros(1, D_MODEL, device=device)),
        lambda: torch_hook(wrap(tiny_model(name, device)), site, rotated).__enter__(),
    ):
        with pytest.raises(SiteError, match=message):
            call()
    with pytest.raises(SiteError, match=message), model.trace(token_ids(device)):
        edit_in_trace(model, site, rotated, AT)


def test_a_block_must_be_checked_before_a_trace(device):
    """Nothing can be run inside a trace, so the error says what to call before it; residual-stream sites need no check."""
    model = traced(fresh("llama", device))
    message = r"block 2 has not been looked at.*check_site\(model, Site\(2, 'attn_out'\)\), before the trace"
    with pytest.raises(SiteError, match=message), model.trace(token_ids(device)):
        edit_in_trace(model, Site(2, "attn_out"), rotated, AT)
    record(model, EVEN, [Site(2, "mlp_out")])  # to record a site of the block is to look at it
    with model.trace(token_ids(device)):
        edit_in_trace(model, Site(2, "attn_out"), rotated, AT)
        logits = model.output.logits.save()
    assert close(logits[:, AT:], reference("llama", device, Site(2, "attn_out")))


def test_an_error_inside_the_hooks_context_is_raised_unchanged(device):
    for manager in (fwd_hooks(Site(2), rotated, AT), torch_hook(wrap(tiny_model("llama", device)), Site(2), rotated)):
        with pytest.raises(KeyError, match="mine"), manager:
            raise KeyError("mine")


@pytest.mark.parametrize("nothing", [lambda x: x, lambda x: x.clone()], ids=["same", "copy"])
@pytest.mark.parametrize("wrapper", WRAPPERS[1:])
def test_an_edit_that_changes_nothing_raises(wrapper, nothing, device):
    with torch.no_grad():
        clean = tiny_model("llama", device)(input_ids=token_ids(device)).logits
    for site in sites("llama", (2,)):
        with pytest.raises(EditError, match=f"the edit at blocks.2.hook_{site.point} changed nothing"):
            run("llama", wrapper, site, nothing, AT, device)
        assert close(run("llama", wrapper, site, nothing, AT, device, may_change_nothing=True), clean)


@pytest.mark.parametrize(
    "wrong", [lambda x: x[..., :5], lambda x: x[:1], lambda x: x.mean()], ids=["d", "row", "scalar"]
)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_an_edit_of_the_wrong_shape_raises(wrapper, wrong, device):
    for position in (AT, None):
        with pytest.raises(EditError, match=r"the edit gave shape .*expected"):
            run("llama", wrapper, Site(2), wrong, position, device)


def test_edit_at_leaves_its_argument_unchanged_and_keeps_dtype(device):
    hidden = torch.randn(2, 5, D_MODEL, device=device).to(torch.bfloat16)
    before = hidden.clone()
    new = edit_at(hidden, lambda x: x.double() + 1, torch.tensor([1, 4]))
    assert torch.equal(hidden, before) and new.dtype == torch.bfloat16
    changed = (new != hidden).any(-1)
    assert changed.nonzero().tolist() == [[0, 1], [1, 4]]


# Parity of what is measured


@pytest.mark.parametrize(
    ("wrapper", "name", "point"),
    [
        pytest.param(wrapper, *case, marks=[pytest.mark.bridge] if wrapper == "bridge" else [])
        for turn, wrapper in enumerate(("bridge", "nnsight"))
        for case in points_by_turns(*REPLAYED, turn=turn)
    ],
)
def test_wrapped_models_give_the_effects_of_plain_forward_passes(wrapper, name, point, device):
    """By replay and by full passes, against each prompt alone in the plain model; one edited position or several by turns."""
    hf, tokens = tiny_model(name, device), prompts()
    turn = REPLAYED.index(name) + POINTS.index(point)
    site = Site((1, 3, 0, N_LAYERS - 1)[turn % 4], point)
    prompt, position = rows() if turn % 2 else several()
    horizon = (12, 1, "last", 5)[turn % 4]
    theirs, mine = record(wrap(hf), tokens, [site]), record(wrap(wrapped(name, wrapper, device)), tokens, [site])
    keep = within(position, horizon)
    prompt, position = prompt[keep][::3], position[keep][::3]
    vectors = edited(theirs, site, prompt, position)
    for ids, a, b in zip(tokens, mine.activations[site], theirs.activations[site], strict=True):
        assert torch.allclose(a[: len(ids)], b[: len(ids)], atol=1e-4, rtol=1e-5)
    slow = all_alone(name, hf, tokens, site, prompt, position, vectors, horizon)
    clean = all_alone(name, hf, tokens, site, prompt, position, None, horizon)
    some = (mine, site, prompt, position, vectors)
    logits = intervened_logits(*some, horizon=horizon, path="hooks")
    gap = (logits - (slow[:, : logits.shape[1]] if slow.ndim == 3 else slow)).abs()
    assert torch.equal(gap.isnan(), logits.isnan()) and gap.nan_to_num(0).max() <= TOLERANCE
    expected = measure(theirs, *some[1:], metrics=("kl_direct",), horizon=horizon)["kl_direct"]
    for path in ("replay", "hooks"):
        effects = measure(*some, metrics=("kl", "top1_changed", "kl_direct"), horizon=horizon, path=path)
        assert effects.path == path
        assert_same_effect(effects["kl"], exact_kl(clean, slow), TOLERANCE)
        changed = (slow.argmax(-1) != clean.argmax(-1)).cpu() & (effects.position >= 0)
        assert (effects["top1_changed"] != changed).float().mean() <= 0.01  # a tie may fall either way
        assert_same_effect(effects["kl_direct"], expected, TOLERANCE)


@pytest.mark.bridge
def test_a_users_bridge_hooks_fire_during_replay(device):
    """They fire only in the blocks that replay runs, and the changes they make take effect."""
    handle = bridge("llama", fresh("llama", device))
    site, (prompt, position) = Site(2), rows()
    recording = record(handle, prompts(), [site, Site(4)])
    vectors = edited(recording, site, prompt, position)
    untouched = measure(recording, site, prompt, position, vectors)["kl"]
    calls = {layer: 0 for layer in range(N_LAYERS)}

    def count(tensor, hook):
        calls[int(hook.name.split(".")[1])] += 1
        return tensor

    for layer in calls:
        handle.add_hook(f"blocks.{layer}.hook_resid_post", count)
    with pytest.raises(ModelError, match=r"the model's hooks .*changed after it was recorded"):
        measure(recording, site, prompt, position, vectors)
    hooked = record(handle, prompts(), [site, Site(4)])
    for where, options, ran in ((site, {}, [0, 0, 0, 2, 2, 2]), (Site(4), {"horizon": 5}, [0, 0, 0, 0, 0, 2])):
        measure(
            hooked, where, prompt, position, vectors, **options
        )  # its trial: both paths; then each chunk twice, clean first
        calls.update(dict.fromkeys(calls, 0))
        counted = measure(hooked, where, prompt, position, vectors, **options)
        assert counted.path == "replay" and [calls[layer] for layer in range(N_LAYERS)] == ran
    assert_same_effect(measure(hooked, site, prompt, position, vectors)["kl"], untouched.double(), TOLERANCE)
    handle.reset_hooks()
    handle.add_hook("blocks.4.hook_resid_post", lambda tensor, hook: 0.5 * tensor)
    halved = record(handle, prompts(), [site])
    found = measure(halved, site, prompt, position, vectors)
    assert found.path == "replay" and not torch.allclose(found["kl"], untouched, atol=1e-3)
    assert_same_effect(
        found["kl"], measure(halved, site, prompt, position, vectors, path="hooks")["kl"].double(), TOLERANCE
    )
    handle.reset_hooks()
    assert torch.equal(measure(recording, site, prompt, position, vectors)["kl"], untouched)


@pytest.mark.parametrize("wrapper", WRAPPERS[1:])
@pytest.mark.parametrize("site", [Site(0, "resid_pre"), Site(2, "resid_mid")], ids=str)
def test_a_wrapped_model_is_left_unchanged(wrapper, site, device):
    handle = bridge("llama", fresh("llama", device)) if wrapper == "bridge" else traced(fresh("llama", device))
    model, ids = wrap(handle), token_ids(device)
    with torch.no_grad():
        before = model.hf(input_ids=ids).logits
    forwards = {name: module.__dict__.get("forward") for name, module in model.hf.named_modules()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules()]
    recording = record(model, prompts(), [site])
    prompt, position = rows()
    for path, horizon in (("auto", "last"), ("hooks", 1)):
        measure(
            recording, site, prompt, position, edited(recording, site, prompt, position), path=path, horizon=horizon
        )
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules()]
    for name, module in model.hf.named_modules():
        assert module.__dict__.get("forward") == forwards[name]
    with torch.no_grad():
        assert torch.equal(model.hf(input_ids=ids).logits, before)
