"""Second order: forward mode and central differences against a dense Fisher matrix, against Hessians of KL and against KL itself."""

import functools

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from interventions import EditError, MechdiagError, ReplayError, Site, measure, record, wrap
from interventions.attribution import gradients
from interventions.second_order import second_order
from interventions.shared_directions import Directions
from tests.tiny import D_MODEL, changed_in, forward_alone, fresh, points, prompts, rows, tiny_model, wrapped

PROMPT, POSITION = rows(((0, 3), (3, 20), (0, 0), (2, 16), (0, 3)))
SITE = Site(2)


@functools.cache
def recorded(name: str, dtype: torch.dtype = torch.float64):
    return record(wrap(tiny_model(name, "cpu", dtype)), prompts(), [Site(2, point) for point in points(name)])


def changes(seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return 0.3 * torch.randn(
        len(PROMPT), D_MODEL, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def logits_of(name: str, hf: nn.Module, site: Site, row: int, vector: torch.Tensor) -> torch.Tensor:
    """Logits `[vocab]` of one full forward pass with a torch hook; gradients flow."""
    tokens, q = torch.tensor([prompts()[int(PROMPT[row])]]), int(POSITION[row])

    def change(hidden):
        return hidden.index_put((torch.tensor([0]), torch.tensor([q])), vector[None])

    remove = changed_in(name, hf, site, change)
    try:
        return hf(input_ids=tokens).logits[0, q]
    finally:
        remove()


def dense(name: str, site: Site, row: int, x: torch.Tensor, dtype: torch.dtype = torch.float64):
    """J [vocab, d_model] and p, by reverse-mode differentiation of a full forward pass with a torch hook."""
    hf = tiny_model(name, "cpu", dtype)
    jacobian = torch.autograd.functional.jacobian(lambda v: logits_of(name, hf, site, row, v), x)
    return jacobian, logits_of(name, hf, site, row, x).softmax(-1)


def form(jacobian: torch.Tensor, p: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """½ ΔᵀFΔ with F = Jᵀ(diag p − ppᵀ)J written out."""
    fisher = jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
    return delta @ fisher @ delta / 2


# Against dense matrices


@pytest.mark.parametrize(("name", "point"), [("gpt2", point) for point in points("gpt2")] + [("phi", "mlp_out")])
def test_second_order_equals_the_dense_fisher_form(name, point):
    recording, site, delta = recorded(name), Site(2, point), changes()
    found = second_order(recording, site, PROMPT, POSITION, delta)
    x = recording.at(site, PROMPT, POSITION)
    expected = torch.stack([form(*dense(name, site, i, x[i]), delta[i]) for i in range(len(PROMPT))])
    assert found.method == "forward" and found.path == "replay" and found.agreement < 1e-3
    torch.testing.assert_close(found["second_order"], expected, rtol=1e-8, atol=0)


def test_second_order_is_half_the_hessian_of_kl_at_zero():
    recording, delta = recorded("gpt2"), changes()
    found = second_order(recording, SITE, PROMPT, POSITION, delta)["second_order"]
    hf = tiny_model("gpt2", "cpu", torch.float64)
    for row in (0, 1):
        x = recording.at(SITE, PROMPT, POSITION)[row]
        log_p = logits_of("gpt2", hf, SITE, row, x).log_softmax(-1)

        def kl(v, row=row, x=x, log_p=log_p):
            return (log_p.exp() * (log_p - logits_of("gpt2", hf, SITE, row, x + v).log_softmax(-1))).sum()

        with sdpa_kernel(SDPBackend.MATH):  # which can be differentiated twice
            hessian = torch.autograd.functional.hessian(kl, torch.zeros_like(x))
        assert float(found[row]) == pytest.approx(float(delta[row] @ hessian @ delta[row] / 2), rel=1e-5)


@pytest.mark.parametrize(("name", "point"), [("llama", "resid_post"), ("gemma2", "attn_out"), ("gemma3", "resid_mid")])
def test_forward_and_central_methods_agree_in_float32(name, point):
    """Central differences agree with the dense form to 1e-3 over all rows, forward mode to rounding."""
    recording, site, delta = recorded(name, torch.float32), Site(2, point), changes(dtype=torch.float32)
    x = recording.at(site, PROMPT, POSITION)
    expected = torch.stack([form(*dense(name, site, i, x[i], torch.float32), delta[i]) for i in range(len(PROMPT))])
    forward, central = (second_order(recording, site, PROMPT, POSITION, delta, method=m) for m in ("auto", "central"))
    assert (forward.method, central.method) == ("forward", "central") and central.agreement != central.agreement
    torch.testing.assert_close(forward["second_order"], expected, rtol=1e-4, atol=0)
    error = (central["second_order"] - expected).norm() / expected.norm()
    assert float(error) < 1e-3 and forward.agreement < 1e-2


# Against KL, gradients and differences


def test_kl_of_small_steps_tends_to_second_order():
    """KL(tΔ)/t² has an error of O(t): a tenth of the step gives a tenth of the error."""
    recording, delta = recorded("gpt2"), changes()
    found = second_order(recording, SITE, PROMPT, POSITION, delta)["second_order"]
    x = recording.at(SITE, PROMPT, POSITION)
    off = [
        (measure(recording, SITE, PROMPT, POSITION, x + t * delta)["kl"] / t**2 / found - 1).abs()
        for t in (1e-2, 1e-3, 1e-4)
    ]
    assert (found > 1e-4).all() and (off[2] < 1e-3).all()
    assert (off[1] < 0.2 * off[0] + 1e-6).all() and (off[2] < 0.2 * off[1] + 1e-6).all()


def test_mean_over_all_next_tokens_equals_second_order():
    """Computes ½ (∂ log p(y)/∂x · Δ)² for every y from gradients; functions in `also` see the same derivatives."""
    recording, delta = recorded("gpt2"), changes()
    vocab = recording.model.vocab_size
    every = torch.arange(vocab).repeat(len(PROMPT))
    grads, log_p = gradients(
        *(recording, SITE, PROMPT.repeat_interleave(vocab), POSITION.repeat_interleave(vocab)),
        lambda logits, rows: logits.log_softmax(-1).gather(1, every[rows][:, None])[:, 0],
    )
    slope = (grads.view(len(PROMPT), vocab, -1) * delta[:, None]).sum(-1)
    own = {"of its row": lambda s, rows: s.gather(1, rows[:, None])[:, 0], "of 90": lambda s, _: s[:, 90]}
    found = second_order(recording, SITE, PROMPT, POSITION, delta, also=own, batch_rows=1)
    expected = (log_p.view(-1, vocab).exp() * slope.square()).sum(-1) / 2
    torch.testing.assert_close(found["second_order"], expected, rtol=1e-9, atol=0)
    row = torch.arange(len(PROMPT))
    torch.testing.assert_close(found["of its row"], slope[row, row], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found["of 90"], slope[:, 90], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", ["forward", "central"])
def test_several_edited_positions_are_exact_at_later_ones(method):
    """Compared with fourth-order differences of full forward passes, in float64."""
    recording, hf = recorded("gpt2"), tiny_model("gpt2", "cpu", torch.float64)
    prompt, position = torch.tensor([0, 2]), torch.tensor([[3, 5], [8, -1]])
    delta = changes(3)[:4].view(2, 2, D_MODEL)
    found = second_order(recording, SITE, prompt, position, delta, horizon=4, method=method)["second_order"]
    for row in range(2):
        tokens, places = prompts()[int(prompt[row])], [q for q in position[row].tolist() if q >= 0]

        def at(t, row=row, tokens=tokens, places=places):
            edits = {q: (lambda x, d=delta[row, j]: x + t * d) for j, q in enumerate(places)}
            return forward_alone("gpt2", hf, tokens, SITE, edits)

        near, far = ((at(t) - at(-t)) / (2 * t) for t in (1e-3, 2e-3))
        slope, p = (4 * near - far) / 3, at(0.0).softmax(-1)
        exact = (p * (slope - (p * slope).sum(-1, keepdim=True)).square()).sum(-1) / 2
        here = exact[places[0] : places[0] + 4]
        torch.testing.assert_close(found[row], here, rtol=1e-7 if method == "forward" else 1e-3, atol=0)


def test_chunks_and_shared_directions_change_nothing():
    recording, delta = recorded("gpt2"), changes()
    whole = second_order(recording, SITE, PROMPT, POSITION, delta)["second_order"]
    along = Directions(delta / 3).times(torch.full((len(delta),), 3.0, dtype=delta.dtype), torch.arange(len(delta)))
    for change in (along, lambda some: delta[some]):
        again = second_order(recording, SITE, PROMPT, POSITION, change, batch_rows=2)["second_order"]
        torch.testing.assert_close(again, whole, rtol=1e-9, atol=0)


def test_zero_change_is_zero_and_nonfinite_ones_are_counted():
    recording, delta = recorded("gpt2"), changes()
    whole = second_order(recording, SITE, PROMPT, POSITION, delta)["second_order"]
    delta = delta.clone()
    delta[1], delta[3, 2] = 0.0, torch.nan
    for method in ("forward", "central"):
        found = second_order(recording, SITE, PROMPT, POSITION, delta, method=method)
        assert found["second_order"][1] == 0 and found["second_order"][3].isnan() and found.n_nonfinite == 1
        torch.testing.assert_close(found["second_order"][[0, 2, 4]], whole[[0, 2, 4]], rtol=1e-3, atol=0)


# However the model is wrapped, and where it has no forward mode


@pytest.mark.parametrize("kind", [pytest.param("bridge", marks=pytest.mark.bridge), "nnsight"])
@pytest.mark.parametrize("path", ["replay", "hooks"])
def test_wrapped_models_give_the_same(kind, path):
    delta = changes(dtype=torch.float32)
    one, other = (record(wrap(wrapped("llama", how)), prompts(), [SITE]) for how in ("plain", kind))
    expected = second_order(one, SITE, PROMPT, POSITION, delta)
    found = second_order(other, SITE, PROMPT, POSITION, delta, path=path)
    assert found.path == path and found.method == "forward"
    torch.testing.assert_close(found["second_order"], expected["second_order"], rtol=1e-3, atol=0)


@pytest.mark.filterwarnings("ignore:mechdiag falls back to central differences")
@pytest.mark.parametrize(("name", "method"), [("bloom", "central"), ("gpt_neo", "forward"), ("mamba", "forward")])
def test_models_without_replay_use_full_forward_passes(name, method):
    """BLOOM's GELU is a custom function without forward mode."""
    recording = record(wrap(fresh(name)), prompts(), [SITE])
    delta = changes(dtype=torch.float32)[:2]
    with pytest.warns(UserWarning, match="falls back to full forward passes"):
        found = second_order(recording, SITE, PROMPT[:2], POSITION[:2], delta)
    x = recording.at(SITE, PROMPT, POSITION)
    expected = torch.stack([form(*dense(name, SITE, i, x[i], torch.float32), delta[i]) for i in range(2)])
    assert found.path == "hooks" and found.why_hooks and found.method == method
    torch.testing.assert_close(found["second_order"], expected, rtol=1e-4 if method == "forward" else 1e-2, atol=0)


class _Opaque(torch.autograd.Function):
    """A kernel without a forward mode."""

    @staticmethod
    def forward(ctx, x):
        return torch.tanh(x)


class _Kernel(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        return _Opaque.apply(x) if self.kind == "without" else torch.tanh(x if self.kind == "plain" else x.detach())


@pytest.mark.parametrize(
    ("kind", "why"), [("without", "cannot be differentiated"), ("loses", r"differ by 0\.\d+ of JΔ")]
)
def test_missing_forward_mode_falls_back_to_central_differences(kind, why):
    """One kernel raises, one silently loses the tangent."""

    def recording_of(kernel: str):
        hf = fresh("llama")
        for block in hf.model.layers:
            block.mlp.act_fn = _Kernel(kernel)
        return record(wrap(hf), prompts(), [SITE])

    delta = changes(dtype=torch.float32)
    expected = second_order(recording_of("plain"), SITE, PROMPT, POSITION, delta, method="forward")["second_order"]
    recording = recording_of(kind)
    with pytest.warns(UserWarning, match=f"falls back to central differences for .*{why}"):
        found = second_order(recording, SITE, PROMPT, POSITION, delta)
    assert found.method == "central" and found.path == "replay" and found.why_central
    assert float((found["second_order"] - expected).norm() / expected.norm()) < 1e-3
    with pytest.raises(ReplayError, match=f"{why}.*use method='auto' or 'central'"):
        second_order(recording, SITE, PROMPT, POSITION, delta, method="forward")


def test_half_precision_is_close_to_float32():
    delta = changes()
    one, other = (
        record(wrap(tiny_model("llama", "cpu", d)), prompts(), [SITE]) for d in (torch.float32, torch.bfloat16)
    )
    expected = second_order(one, SITE, PROMPT, POSITION, delta)["second_order"]
    found = second_order(other, SITE, PROMPT, POSITION, delta, method="auto")
    assert found.method == "forward"
    assert float((found["second_order"] - expected).norm() / expected.norm()) < 0.1


def test_invalid_arguments_raise():
    recording, delta = recorded("gpt2"), changes()
    with pytest.raises(MechdiagError, match="method 'backward'; expected one of auto, forward, central"):
        second_order(recording, SITE, PROMPT, POSITION, delta, method="backward")
    with pytest.raises(MechdiagError, match="named 'second_order'"):
        second_order(recording, SITE, PROMPT, POSITION, delta, also={"second_order": lambda s, _: s[:, 0]})
    with pytest.raises(EditError, match=r"edited vectors of shape"):
        second_order(recording, SITE, PROMPT, POSITION, delta[:, :5])
