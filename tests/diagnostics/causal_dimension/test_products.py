"""JᵀMJ through replay against J by reverse-mode differentiation of full forward passes with a torch hook."""

import functools

import pytest
import torch

from diagnostics.causal_dimension import products as module
from diagnostics.causal_dimension.products import METRICS, jacobian_products
from interventions import Site, record, wrap
from tests.tiny import D_MODEL, N_LAYERS, VOCAB, changed_in, prompts, tiny_model

TOKENS = ((0, 3), (2, 16), (3, 20))
EYE = torch.eye(D_MODEL, dtype=torch.float64)


def dtype(name: str) -> torch.dtype:
    """Gemma's norms compute in float32 whatever the model's dtype."""
    return torch.float32 if name == "gemma2" else torch.float64


@functools.cache
def recorded(name: str, site: Site):
    return record(wrap(tiny_model(name, "cpu", dtype(name))), prompts(), [site])


def products(name: str, site: Site, directions: torch.Tensor = EYE, tokens=TOKENS, **how):
    found = {}
    prompt, position = torch.tensor(tokens).T
    said = jacobian_products(
        recorded(name, site),
        site,
        prompt,
        position,
        directions.to(dtype(name)),
        lambda i, m: found.update({i: m}),
        **how,
    )
    assert list(found) == list(range(len(tokens)))
    return found, said


def jacobian(name: str, site: Site, prompt: int, position: int) -> tuple[torch.Tensor, torch.Tensor]:
    """J `[vocab, d_model]` and p."""
    hf, ids = tiny_model(name, "cpu", dtype(name)), torch.tensor([prompts()[prompt]])

    def logits(vector: torch.Tensor) -> torch.Tensor:
        at = (torch.tensor([0]), torch.tensor([position]))
        remove = changed_in(name, hf, site, lambda hidden: hidden.index_put(at, vector[None]))
        try:
            return hf(input_ids=ids).logits[0, position]
        finally:
            remove()

    x = recorded(name, site).of(site)[prompt, position]
    return torch.autograd.functional.jacobian(logits, x).double(), logits(x).double().softmax(-1)


def dense(name: str, site: Site, token: tuple[int, int]) -> dict[str, torch.Tensor]:
    j, p = jacobian(name, site, *token)
    centre = torch.eye(VOCAB, dtype=torch.float64) - 1 / VOCAB
    return {"fisher": j.T @ (torch.diag(p) - torch.outer(p, p)) @ j, "logits": j.T @ centre @ j}


@pytest.mark.parametrize(
    ("name", "point", "allowed"),
    [("gpt2", "resid_post", 1e-8), ("gpt2", "mlp_out", 1e-8), ("phi", "resid_pre", 1e-8), ("gemma2", "attn_out", 1e-4)],
)
def test_products_match_autograd(name, point, allowed):
    """Gemma's unembedding is soft-capped, hence not linear."""
    site = Site(2, point)
    found, said = products(name, site)
    assert (said.path, said.method) == ("replay", "forward") and said.agreement < 1e-3 and said.finite.all()
    for i, token in enumerate(TOKENS):
        for metric, expected in dense(name, site, token).items():
            off = (found[i][metric] - expected).norm() / expected.norm()
            assert float(off) < allowed, (token, metric)


@pytest.mark.parametrize("how", [{"batch_rows": 5}, {"batch_rows": 70}, {"path": "hooks"}], ids=str)
def test_chunk_sizes_and_paths_give_equal_products(how):
    """Chunks that end within a token, and some that hold several."""
    one, other = products("gpt2", Site(3))[0], products("gpt2", Site(3), **how)[0]
    for i in one:
        for metric in METRICS:
            torch.testing.assert_close(one[i][metric], other[i][metric], rtol=1e-9, atol=1e-12)


def test_a_linear_unembedding_is_multiplied_once(monkeypatch):
    """Multiplying by its weight matches derivatives of every logit; a soft-capped unembedding is not linear."""
    used, real = {}, module.linear_head

    def spy(work):
        used[work.rows.recording.model.name] = real(work)
        return used[work.rows.recording.model.name]

    monkeypatch.setattr(module, "linear_head", spy)
    one = products("gpt2", Site(3))[0]
    products("gemma2", Site(3))
    assert {name: weight is not None for name, weight in used.items()} == {
        "GPT2LMHeadModel": True,
        "Gemma2ForCausalLM": False,
    }
    monkeypatch.setattr(module, "linear_head", lambda _: None)
    other = products("gpt2", Site(3))[0]
    for i in one:
        for metric in METRICS:
            torch.testing.assert_close(one[i][metric], other[i][metric], rtol=1e-9, atol=1e-12)


def test_sketch_equals_the_projected_full_matrix():
    some = torch.randn(7, D_MODEL, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    full, sketch = products("gpt2", Site(1))[0], products("gpt2", Site(1), some)[0]
    for i in full:
        for metric in METRICS:
            torch.testing.assert_close(sketch[i][metric], some @ full[i][metric] @ some.T, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_final_norm_removes_the_radial_direction(name):
    """After the last block JᵀMJ has no radial direction (RMSNorm); LayerNorm takes away the mean's direction too."""
    site = Site(N_LAYERS - 1)
    found, _ = products(name, site)
    for i, token in enumerate(TOKENS):
        x = recorded(name, site).of(site)[token]
        gone = [x] if name == "llama" else [x - x.mean(), torch.ones_like(x)]
        values = torch.linalg.eigvalsh(found[i]["fisher"])
        assert int((values < 1e-7 * values[-1]).sum()) == len(gone)
        for v in gone:
            assert float(v @ found[i]["fisher"] @ v / (v @ v)) < 1e-7 * float(values[-1])
