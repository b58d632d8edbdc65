"""One edit by each framework's own hooks, against a torch hook set by the test on a plain copy of the model.

A bridge changes the model that it wraps, so every wrapper gets its own copy. Its attention sums in another order:
`tiny.TOLERANCE`.
"""

import functools

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
from interventions.hooks import edit_at, torch_hook
from tests.tiny import (
    BRIDGED,
    D_MODEL,
    LAYERS,
    N_LAYERS,
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
    prompts,
    rows,
    several,
    sites,
    tiny_model,
    traced,
    within,
)

CASES = [(name, site) for name in BRIDGED for site in sites(name, LAYERS if name in ("llama", "gpt2") else (2,))]
CASES = [pytest.param(name, site, id=f"{name}-{site}") for name, site in CASES]
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


@functools.cache
def wrapped(name, wrapper, device):
    """A bridge or an nnsight model that tests share: helpers leave nothing behind."""
    hf = fresh(name, device)
    return bridge(name, hf) if wrapper == "bridge" else traced(hf)


# The helpers


@pytest.mark.bridge
@pytest.mark.parametrize(("name", "site"), CASES)
def test_fwd_hooks_in_a_bridge(name, site, device):
    model = wrapped(name, "bridge", device)
    with fwd_hooks(site, rotated, AT) as hooks:
        assert [at for at, _ in hooks] == [site.hook_name] or site.point == "resid_mid"
        logits = model.run_with_hooks(token_ids(device), fwd_hooks=hooks)
    assert close(logits[:, AT:], reference(name, device, site))
    assert not close(logits[:, AT], model(token_ids(device))[:, AT])


@pytest.mark.parametrize(("name", "site"), CASES)
def test_edit_in_trace_of_nnsight(name, site, device):
    model = wrapped(name, "nnsight", device)
    check_site(model, site)
    with model.trace(token_ids(device)):
        edit_in_trace(model, site, rotated, AT)
        logits = model.output.logits.save()
    assert close(logits[:, AT:], reference(name, device, site))


@pytest.mark.parametrize(("name", "site"), CASES)
def test_torch_hook_on_the_plain_module(name, site, device):
    model = wrap(tiny_model(name, device))
    with torch_hook(model, site, rotated, AT):
        logits = model.hf(input_ids=token_ids(device)).logits
    assert close(logits[:, AT:], reference(name, device, site))


@pytest.mark.bridge
def test_the_bridges_own_resid_mid_is_no_edit_of_the_stream(device):
    """Why `fwd_hooks` does not use it: the MLP's norm reads it, and the stream goes on as it was."""
    model, site = wrapped("llama", "bridge", device), Site(2, "resid_mid")
    theirs = model.run_with_hooks(
        token_ids(device), fwd_hooks=[(site.hook_name, lambda x, hook: edit_at(x, rotated, AT))]
    )
    assert not close(theirs[:, AT:], reference("llama", device, site))


@pytest.mark.parametrize(
    "wrapper", ["plain", pytest.param("bridge", marks=pytest.mark.bridge), pytest.param("nnsight")]
)
@pytest.mark.parametrize("point", points("llama"))
def test_an_edit_of_a_whole_site_is_seen_at_every_position(point, wrapper, device):
    """At `resid_mid` an edit sees the stream, not what attention adds to it."""
    seen, site = [], Site(2, point)

    def edit(x):
        seen.append(x.clone())
        return 2 * x

    if wrapper == "nnsight":
        check_site(wrapped("llama", wrapper, device), site)
    run("llama", wrapper, site, edit, None, device, shared=True)
    recorded = record(tiny_model("llama", device), EVEN, [site]).activations[site]
    assert torch.allclose(seen[-1], recorded, atol=TOLERANCE, rtol=1e-5)


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


def run(name, wrapper, site, edit, position, device, shared=False, **options):
    """Logits of all positions with `edit` applied, in one of the three frameworks."""
    ids = token_ids(device)
    if wrapper == "plain":
        model = wrap(tiny_model(name, device))
        with torch_hook(model, site, edit, position):
            return model.hf(input_ids=ids).logits
    if wrapper == "bridge":
        model = wrapped(name, wrapper, device) if shared else bridge(name, fresh(name, device))
        with fwd_hooks(site, edit, position, **options) as hooks:
            return model.run_with_hooks(ids, fwd_hooks=hooks)
    model = wrapped(name, wrapper, device) if shared else traced(fresh(name, device))
    with model.trace(ids):
        edit_in_trace(model, site, edit, position, **options)
        logits = model.output.logits.save()
    return logits


# What raises


def test_a_hook_that_did_not_fire():
    with pytest.raises(HookError, match=r"blocks.2.hook_resid_post did not fire"), fwd_hooks(Site(2), rotated, AT):
        pass


@pytest.mark.parametrize("site", sites("llama", (2,)), ids=str)
def test_a_torch_hook_that_did_not_fire(site, device):
    with (
        pytest.raises(HookError, match=f"the hook at {site} did not fire"),
        torch_hook(wrap(tiny_model("llama", device)), site, rotated),
    ):
        pass


@pytest.mark.bridge
@pytest.mark.parametrize("site", [Site(2, "resid_mid"), Site(2, "attn_out")], ids=str)
def test_a_hook_inside_a_block_that_did_not_fire(site, device):
    model = wrapped("llama", "bridge", device)
    with pytest.raises(HookError, match="did not fire"), fwd_hooks(site, rotated, AT) as hooks:
        model.run_with_hooks(token_ids(device), fwd_hooks=hooks, stop_at_layer=2)


# Sites that are not there


@pytest.mark.parametrize("name", ["gpt_neox", "phi"])
def test_no_resid_mid_on_any_path_where_blocks_are_parallel(name, device):
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


def test_a_block_that_a_trace_must_look_at_first(device):
    """Inside a trace nothing can be run: an error says what to call before; the stream needs no look."""
    model = traced(fresh("llama", device))
    message = r"block 2 has not been looked at.*check_site\(model, Site\(2, 'attn_out'\)\), before the trace"
    with pytest.raises(SiteError, match=message), model.trace(token_ids(device)):
        edit_in_trace(model, Site(2, "attn_out"), rotated, AT)
    record(model, EVEN, [Site(2, "mlp_out")])  # to record a site of the block is to look at it
    with model.trace(token_ids(device)):
        edit_in_trace(model, Site(2, "attn_out"), rotated, AT)
        logits = model.output.logits.save()
    assert close(logits[:, AT:], reference("llama", device, Site(2, "attn_out")))


def test_an_error_inside_is_not_replaced_by_one_of_ours(device):
    for manager in (fwd_hooks(Site(2), rotated, AT), torch_hook(wrap(tiny_model("llama", device)), Site(2), rotated)):
        with pytest.raises(KeyError, match="mine"), manager:
            raise KeyError("mine")


@pytest.mark.bridge
def test_a_bridge_that_stops_below_the_hook(device):
    model = bridge("llama", fresh("llama", device))
    with pytest.raises(HookError, match="did not fire"), fwd_hooks(Site(4), rotated, AT) as hooks:
        model.run_with_hooks(token_ids(device), fwd_hooks=hooks, stop_at_layer=2)


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
    for site in sites("llama", (2,)):
        check_site(wrapped("llama", wrapper, device), site)
        with pytest.raises(EditError, match=f"the edit at blocks.2.hook_{site.point} changed nothing"):
            run("llama", wrapper, site, nothing, AT, device, shared=True)
        logits = run("llama", wrapper, site, nothing, AT, device, shared=True, may_change_nothing=True)
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
    """Both paths, one edited position or several, against each prompt alone in the plain model. At every other point, by turns:
    each wrapper of an architecture meets half of its points, and over the architectures all of them."""
    hf, tokens = tiny_model(name, device), prompts()
    model, plain = wrap(wrapped(name, wrapper, device)), wrap(hf)
    first = (REPLAYED.index(name) + (wrapper == "bridge")) % 2
    for turn, point in list(enumerate(points(name)))[first::2]:
        site = Site((1, 3, 0, N_LAYERS - 1)[turn % 4], point)
        prompt, position = rows() if turn % 2 else several()
        horizon = (12, 1, "last", 5)[turn % 4]
        theirs, mine = record(plain, tokens, [site]), record(model, tokens, [site])
        keep = within(position, horizon)
        prompt, position = prompt[keep][::2], position[keep][::2]
        vectors = edited(theirs, site, prompt, position)
        for ids, a, b in zip(tokens, mine.activations[site], theirs.activations[site], strict=True):
            assert torch.allclose(a[: len(ids)], b[: len(ids)], atol=1e-4, rtol=1e-5)
        slow = all_alone(name, hf, tokens, site, prompt, position, vectors, horizon)
        clean = all_alone(name, hf, tokens, site, prompt, position, None, horizon)
        some = (mine, site, prompt, position, vectors)
        logits = intervened_logits(*some, horizon=horizon, path="hooks")
        gap = (logits - (slow[:, : logits.shape[1]] if slow.ndim == 3 else slow)).abs()
        assert torch.equal(gap.isnan(), logits.isnan()) and gap.nan_to_num(0).max() <= TOLERANCE
        for path in ("auto", "hooks")[: 1 + (turn == first)]:
            effects = measure(*some, metrics=("kl", "top1_changed", "kl_direct"), horizon=horizon, path=path)
            assert effects.path == ("hooks" if path == "hooks" else "replay")
            assert_same_effect(effects["kl"], exact_kl(clean, slow), TOLERANCE)
            changed = (slow.argmax(-1) != clean.argmax(-1)).cpu() & (effects.position >= 0)
            assert (effects["top1_changed"] != changed).float().mean() <= 0.01  # a tie may fall either way
            expected = measure(theirs, *some[1:], metrics=("kl_direct",), horizon=horizon)["kl_direct"]
            assert_same_effect(effects["kl_direct"], expected, TOLERANCE)


@pytest.mark.bridge
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_users_bridge_hooks_fire_during_replay(name, device):
    """On the blocks that replay runs, not on those it skips; and what they change counts."""
    handle = bridge(name, fresh(name, device))
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


@pytest.mark.parametrize("wrapper", [pytest.param("bridge", marks=pytest.mark.bridge), "nnsight"])
@pytest.mark.parametrize("site", [Site(0, "resid_pre"), Site(2, "resid_mid"), Site(N_LAYERS - 1)], ids=str)
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
    for path, horizon in (("auto", "last"), ("hooks", 1)):
        measure(
            recording, site, prompt, position, edited(recording, site, prompt, position), path=path, horizon=horizon
        )
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules()]
    for name, module in model.hf.named_modules():
        assert module.__dict__.get("forward") == forwards[name]
    with torch.no_grad():
        assert torch.equal(model.hf(input_ids=ids).logits, before)
