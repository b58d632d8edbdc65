"""Sites inside a block, one at a time and several in one row: by replay and by full passes what torch hooks set here give.

float32 logits below 10, so `tiny.TOLERANCE` between two ways; about 1e-5 is seen.
"""

import warnings

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from interventions import (
    EditError,
    Put,
    Site,
    SiteError,
    check_site,
    intervened_logits,
    measure_joint,
    record,
    wrap,
)
from interventions.attribution import gradients
from interventions.metrics import LogitDifference
from interventions.models.anatomy import n_heads, site_width
from interventions.sites import HEADS, INSIDE, POINTS
from tests import inside
from tests.tiny import HOOKED, N_LAYERS, TOLERANCE, VOCAB, fresh, prompts, tiny_model, wrapped

LAYER, TEXTS = 2, prompts((14, 9, 14))
WRAPPERS = ("plain", "bridge", "traced")
EACH_TOKEN = [LogitDifference([t], [0], name=f"t{t}") for t in range(1, VOCAB)]
CASES = [(name, WRAPPERS[i % 2]) for i, name in enumerate(inside.NAMES)] + [
    *(("llama", wrapper) for wrapper in WRAPPERS[1:]),
    *(("gpt2", wrapper) for wrapper in (WRAPPERS[0], WRAPPERS[2])),
    ("opt", "plain"),
]
"""every architecture by one wrapper, and those with projections apart, joined and folded by the others"""


def one_of(name: str, point: str, layer: int = LAYER) -> Site:
    """One head, or some neurons, or all where single heads are refused."""
    if point == "neurons":
        return Site(layer, point, neurons=(3, 60, 7))
    return Site(layer, point, head=1 if inside.single_heads(name, point) else None)


def changed(recording, site, prompt, position, generator):
    """Vectors that differ from what stands there; a pattern's are weights that sum to 1."""
    x = recording.at(site, prompt, position)
    if site.point != "pattern":
        return x + torch.randn(x.shape, generator=generator).to(x) * x.abs().mean() * 2
    weights = torch.rand(x.shape, generator=generator) * (torch.arange(x.shape[1]) <= position[:, None])
    return (weights / weights.sum(-1, keepdim=True)).to(x)


@pytest.mark.parametrize(("name", "wrapper"), CASES)
def test_sites_inside_a_block_match_torch_hooks(name, wrapper, device):
    hf, generator = tiny_model(name), torch.Generator().manual_seed(0)
    recording = record(wrapped(name, wrapper, device), TEXTS, [Site(LAYER, point) for point in INSIDE])
    prompt, position = torch.tensor([0, 0, 1, 2]), torch.tensor([5, 13, 4, 2])
    for point in INSIDE:
        site = one_of(name, point)
        if point != "pattern":
            for i, tokens in enumerate(TEXTS):
                seen = inside.clean(name, hf, tokens, site)
                found = recording.of(site.whole)[i, : len(tokens)].cpu()
                assert torch.allclose(found, seen, atol=TOLERANCE), site
        vectors = changed(recording, site, prompt, position, generator)
        rows = list(zip(prompt.tolist(), position.tolist(), vectors.cpu(), strict=True))
        expected = torch.stack([inside.forward(name, hf, TEXTS[p], [(site, q, v)])[-1] for p, q, v in rows])
        clean = torch.stack([inside.forward(name, hf, TEXTS[p], [])[-1] for p in prompt.tolist()])
        assert float((expected - clean).abs().max()) > 100 * TOLERANCE, "an edit without effect shows nothing"
        for path in ("replay", "hooks"):
            found = intervened_logits(recording, site, prompt, position, vectors, horizon="last", path=path)
            assert torch.allclose(found.cpu(), expected, atol=TOLERANCE), (site, path)


@pytest.mark.parametrize(("name", "wrapper"), CASES)
def test_joint_edits_in_several_blocks_match_torch_hooks(name, wrapper, device):
    """Rows edit up to three blocks and several positions, at every site, with single and all heads and neurons."""
    hf, generator = tiny_model(name), torch.Generator().manual_seed(1)
    everywhere = [Site(layer, point) for layer in range(N_LAYERS) for point in (*INSIDE, "resid_pre", "resid_post")]
    recording = record(wrapped(name, wrapper, device), TEXTS, everywhere)
    rows = (
        (0, [(Site(1, "z", head=2), 4), (one_of(name, "k", 3), 6), (one_of(name, "neurons", 4), 6), (one_of(name, "q", 1), 6)]),
        (1, [(Site(2, "v", head=0), 2), (Site(3, "pattern", head=3), 5), (Site(5, "z", head=0), 8), (Site(5, "z", head=3), 8)]),
        (2, [(Site(0, "z"), 12), (Site(4, "neurons"), 13), (Site(2, "pattern", head=0), 13), (Site(2, "neurons"), 12)]),
        (0, [(Site(5, "z", head=1), 13)]),
        (1, [(one_of(name, "q", 3), 1), (Site(5, "v", head=1), 3), (Site(0, "neurons", neurons=(5,)), 1)]),
    )  # fmt: skip
    by_site, expected = {}, []
    for row, (p, edits) in enumerate(rows):
        whole = []
        for site, q in edits:
            vector = changed(recording, site, torch.tensor([p]), torch.tensor([q]), generator)
            whole.append((site, q, vector[0].cpu()))
            by_site.setdefault(site, []).append((row, q, vector))
        expected.append(inside.forward(name, hf, TEXTS[p], whole)[-1])
    puts = [
        Put(site, torch.tensor([r for r, _, _ in each]), torch.tensor([q for _, q, _ in each]), torch.cat([v for _, _, v in each]))
        for site, each in by_site.items()
    ]  # fmt: skip
    expected = torch.stack(expected)
    for path in ("replay", "hooks"):
        found = measure_joint(recording, torch.tensor([p for p, _ in rows]), puts, metrics=EACH_TOKEN, path=path)
        assert found.path == path and found.n_nonfinite == 0
        differences = torch.stack([found[metric.name] for metric in EACH_TOKEN], dim=1)
        assert torch.allclose(differences, expected[:, 1:] - expected[:, :1], atol=2 * TOLERANCE), path


def test_joint_row_of_one_edit_equals_a_single_edit():
    recording = record(tiny_model("llama"), TEXTS, [Site(3, "resid_post"), Site(2, "resid_pre"), Site(2, "attn_out")])
    prompt, position = torch.tensor([2, 0, 1]), torch.tensor([3, 13, 0])
    for site in recording.activations:
        vectors = recording.at(site, prompt, position) * 1.5
        puts = [Put(site, torch.tensor([i]), position[i : i + 1], vectors[i : i + 1]) for i in (1, 0, 2)]
        found = measure_joint(recording, prompt, puts, metrics=EACH_TOKEN[:9])
        logits = intervened_logits(recording, site, prompt, position, vectors, horizon="last")
        expected = logits[:, 1:10] - logits[:, :1]
        assert torch.allclose(torch.stack([found[m.name] for m in EACH_TOKEN[:9]], 1), expected, atol=TOLERANCE)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**16))
def test_putting_back_clean_values_has_zero_kl(seed):
    """Puts back clean values at random positions of k, v, z and neurons of every block at once."""
    recording = record(
        tiny_model("llama"), TEXTS, [Site(layer, point) for layer in range(N_LAYERS) for point in INSIDE]
    )
    generator = torch.Generator().manual_seed(seed)
    puts = []
    for site in recording.activations:
        if site.point not in ("k", "v", "z", "neurons"):  # z covers queries and patterns
            continue
        some = torch.rand(len(TEXTS), 14, generator=generator) < 0.5
        some &= torch.arange(14) < recording.length[:, None]
        row, position = some.nonzero(as_tuple=True)
        puts.append(Put(site, row, position, recording.at(site, row, position)))
    found = measure_joint(recording, torch.arange(len(TEXTS)), puts)
    assert float(found["kl"].abs().max()) < 1e-9


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
@pytest.mark.parametrize("point", INSIDE)
def test_gradients_equal_finite_differences(name, point):
    """In float64: the directional derivative against central differences of full passes with torch hooks."""
    hf = tiny_model(name, dtype=torch.float64)
    site, prompt, position = one_of(name, point), torch.tensor([0, 1]), torch.tensor([6, 3])
    recording = record(hf, TEXTS, [site])
    metric = LogitDifference([5], [7])
    gradient, _ = gradients(recording, site, prompt, position, metric, horizon="last")
    x = recording.at(site, prompt, position)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    direction *= torch.arange(x.shape[1]) <= position[:, None] if point == "pattern" else 1.0
    for i, p in enumerate(prompt.tolist()):
        step, ends = 1e-5, []
        for sign in (1, -1):
            logits = inside.forward(name, hf, TEXTS[p], [(site, int(position[i]), x[i] + sign * step * direction[i])])
            ends.append(float(logits[-1, 5] - logits[-1, 7]))
        assert abs((ends[0] - ends[1]) / (2 * step) - float(gradient[i] @ direction[i])) < 1e-6


# What a model does not have


def test_transformer_lens_and_own_site_names_are_parsed():
    assert (
        Site.parse("blocks.3.attn.hook_z") == Site(3, "z") and Site(3, "z", head=1).hook_name == "blocks.3.attn.hook_z"
    )
    assert Site.parse("blocks.3.mlp.hook_post") == Site(3, "neurons")
    for site in (Site(3, "k", head=2), Site(11, "neurons", neurons=(5, 9)), Site(0, "pattern")):
        assert Site.parse(str(site)) == site
    for name in ("blocks.3.hook_z", "3.z.1,2", "3.resid_post.1", "3.neurons.4,4", "blocks.3.attn.hook_rot_q"):
        with pytest.raises(SiteError):
            Site.parse(name)
    for wrong in ({"point": "resid_pre", "head": 1}, {"point": "z", "head": -1}, {"point": "z", "neurons": (1,)}):
        with pytest.raises(SiteError):
            Site(3, **wrong)


def test_site_widths_and_head_counts():
    model = wrap(tiny_model("llama"))
    assert [n_heads(model, Site(1, point)) for point in HEADS] == [4, 2, 2, 4, 4]
    assert site_width(model, Site(1, "k")) == 16 and site_width(model, Site(1, "z", head=3)) == 8
    assert site_width(model, Site(1, "neurons")) == 64 and site_width(model, Site(1, "neurons", neurons=(1, 2))) == 2
    assert site_width(model, Site(1, "pattern", head=0), n_pos=14) == 14


@pytest.mark.parametrize(
    ("name", "site", "message"),
    [
        ("olmo2", Site(1, "q", head=0), "no single heads at q in block 1 of Olmo2ForCausalLM: .*norm spans heads"),
        ("olmo2", Site(1, "k", head=0), "norm spans heads"),
        ("llama", Site(1, "k", head=2), "heads run from 0 to 1"),
        ("llama", Site(1, "neurons", neurons=(64,)), "neurons run from 0 to 63"),
        ("llama", Site(6, "z"), "no block 6"),
        ("gpt_neo", Site(1, "pattern"), "no pattern in block 1 of GPTNeoForCausalLM"),
        ("mpt", Site(1, "z", head=0), "no single heads at z in block 1 of MptForCausalLM"),
        ("mamba", Site(1, "z"), "no z in block 1 of MambaForCausalLM"),
        ("mamba", Site(1, "neurons"), "no neurons in block 1"),
    ],
)
def test_missing_sites_raise_with_the_reason(name, site, message):
    with pytest.raises(SiteError, match=message):
        check_site(tiny_model(name), site)


def test_single_heads_of_latent_attention_raise():
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    latent = {"q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    config = transformers.DeepseekV2Config(**settings, **latent, first_k_dense_replace=2, num_key_value_heads=4)
    hf = transformers.DeepseekV2ForCausalLM(config).eval()
    for point in ("q", "k", "v", "z"):
        with pytest.raises(SiteError, match=r"latent \(MLA\)"):
            check_site(hf, Site(1, point, head=0))
    check_site(hf, Site(1, "z"))


class _Shuffled(torch.nn.Module):
    """A projection that gives its numbers in another order; its attention, `Attention`, takes them back into theirs."""

    def __init__(self, projection, order):
        super().__init__()
        self.projection, self.order = projection, order

    def forward(self, x):
        return self.projection(x)[..., self.order]

    class Attention(torch.nn.Module):
        def __init__(self, attention, order):
            super().__init__()
            self.c_attn, self.c_proj = _Shuffled(attention.c_attn, order), attention.c_proj
            self.back, self.inner = torch.argsort(order), [attention]

        def forward(self, *args, **kwargs):
            attention = self.inner[0]
            outer, back = self.c_attn, self.back
            attention.c_attn = torch.nn.Sequential(outer, _Back(back))
            return attention(*args, **kwargs)


class _Back(torch.nn.Module):
    def __init__(self, order):
        super().__init__()
        self.order = order

    def forward(self, x):
        return x[..., self.order]


@pytest.mark.parametrize(
    ("order", "known"),
    [(torch.arange(96).view(3, 4, 8).transpose(0, 1), True), (torch.arange(96).view(8, 12).T, False)],
)
def test_order_of_fused_projections_is_found_or_refused(order, known):
    """GPT-2's fused projection, reordered: heads in a known order are found, shuffled ones raise."""
    hf = fresh("gpt2")
    block = hf.transformer.h[1]
    block.attn = _Shuffled.Attention(block.attn, order.reshape(-1))
    if known:
        check_site(hf, Site(1, "q", head=2))
    else:
        with pytest.raises(SiteError, match="order that is not known"):
            check_site(hf, Site(1, "q", head=2))


# What goes wrong


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([(Site(1, "z", head=0), 3), (Site(1, "attn_out"), 3)], "1.z and 1.attn_out of the same token"),
        ([(Site(1, "z", head=0), 3), (Site(1, "z"), 3)], "1.z of one token twice"),
        ([(Site(1, "q", head=2), 3), (Site(1, "z", head=2), 3)], "1.q and 1.z"),
        ([(Site(1, "pattern", head=2), 3), (Site(1, "z"), 3)], "1.pattern and 1.z"),
        (
            [(Site(1, "neurons", neurons=(3, 4)), 3), (Site(1, "neurons", neurons=(4,)), 3)],
            "1.neurons of one token twice",
        ),
        ([(Site(1, "neurons"), 3), (Site(1, "mlp_out"), 3)], "1.neurons and 1.mlp_out"),
        ([(Site(1, "mlp_out"), 3), (Site(1, "resid_post"), 3)], "1.mlp_out and 1.resid_post"),
        ([(Site(2, "resid_pre"), 3), (Site(1, "resid_post"), 3)], "2.resid_pre and 1.resid_post"),
    ],
)
def test_edits_that_overwrite_one_another_raise(edits, message):
    recording = record(tiny_model("llama"), TEXTS, [site for site, _ in edits])
    puts = [
        Put(s, torch.tensor([0]), torch.tensor([q]), recording.at(s, torch.tensor([0]), torch.tensor([q])))
        for s, q in edits
    ]
    with pytest.raises(EditError, match=message):
        measure_joint(recording, torch.tensor([0]), puts)


def test_edits_of_separate_heads_tokens_and_rows_are_accepted():
    sites = [
        Site(1, "q", head=2),
        Site(1, "z", head=1),
        Site(1, "k", head=0),
        Site(1, "resid_post"),
        Site(1, "attn_out"),
    ]
    recording = record(tiny_model("llama"), TEXTS, sites)
    places = [(0, 3), (0, 3), (0, 3), (0, 4), (1, 3)]
    puts = [
        Put(s, torch.tensor([r]), torch.tensor([q]), recording.at(s, torch.tensor([r]), torch.tensor([q])) * 2)
        for s, (r, q) in zip(sites, places, strict=True)
    ]
    assert measure_joint(recording, torch.tensor([0, 2]), puts)["kl"].isfinite().all()


def test_bad_joint_rows_raise():
    site, one = Site(1, "z", head=0), torch.tensor([0])
    recording = record(tiny_model("llama"), TEXTS, [site])
    vector = recording.at(site, one, one)
    pattern = torch.ones(1, 14)
    for puts, error, message in (
        ([], EditError, "no edits"),
        ([Put(site, one, one, vector[:, :7])], EditError, r"expected \[edit\], \[edit\] and \[edit, 8\]"),
        ([Put(site, one + 2, one, vector)], EditError, "rows from 2 to 2 at 1.z.0; there are 2"),
        ([Put(site, one, one, vector)], EditError, "row 1 edits nothing"),
        (
            [Put(site, one, one + 14, vector), Put(site, one + 1, one, vector)],
            SiteError,
            "position 14 lies outside prompt 0",
        ),
        (
            [Put(Site(1, "pattern", head=0), one, one, pattern)],
            EditError,
            "weight on tokens after the one that attends",
        ),
    ):
        with pytest.raises(error, match=message):
            measure_joint(recording, torch.tensor([0, 1]), puts)
    both = [Put(site, torch.tensor([0, 1]), torch.tensor([0, 5]), vector.expand(2, -1))]
    with pytest.raises(EditError, match="its effect is read at positions"):
        measure_joint(
            recording, torch.tensor([0, 1]), [*both, Put(Site(2, "z", head=0), one, one + 3, vector)], horizon=1
        )
    found = measure_joint(
        recording,
        torch.tensor([0, 1]),
        [both[0]._replace(vectors=vector.expand(2, -1) * torch.tensor([[1.0], [torch.nan]]))],
        nonfinite="count",
    )
    assert found["kl"].isfinite().tolist() == [True, False] and found.n_nonfinite == 1


@pytest.mark.parametrize("name", [name for name in HOOKED if name in ("gpt_neo", "bloom")])
def test_models_without_replay_use_full_passes(name):
    site, where = Site(1, "z", head=1), (torch.tensor([0, 1]), torch.tensor([5, 3]))
    recording = record(fresh(name), TEXTS, [site])
    vectors = recording.at(site, *where) * 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = measure_joint(
            recording, where[0], [Put(site, torch.arange(2), where[1], vectors)], metrics=EACH_TOKEN[:3]
        )
    assert found.path == "hooks" and found.why_hooks
    slow = intervened_logits(recording, site, *where, vectors, horizon="last", path="hooks")
    assert torch.allclose(found["t1"], slow[:, 1] - slow[:, 0], atol=TOLERANCE)


def test_points_and_inside_points_are_disjoint():
    assert not set(POINTS) & set(INSIDE)
    assert Site(3, "z", head=1).entry == Site(3, "resid_pre") and Site(3, "z").first_block == 3
