"""Evaluations of SAEs against independent computations token by token, and against SAEs whose numbers are known."""

import functools
import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn

from diagnostics.sae_evaluation import measures as sae_measures
from diagnostics.sae_evaluation import run as sae_evaluation
from diagnostics.sae_evaluation.measures import MEASURES
from diagnostics.sae_evaluation.result import SAEEvaluation
from diagnostics.sae_evaluation.run import _corpora, evaluate_saes
from diagnostics.sae_evaluation.summary import UNIFORM, bimodality
from diagnostics.sampling.counted import ALL, NO_SINKS, QUARTILES
from interventions import ResultError, Site, SiteError, record
from interventions.files import jsonable
from interventions.texts.prompts import Prompts
from sae_models.architectures import build, named
from sae_models.errors import BelongingError
from sae_models.normalise import LayerNorm
from sae_models.sae import SAE
from sae_models.scores import Inner
from sae_models.selectors import ReLU, TopK
from tests.tiny import D_MODEL, TOLERANCE, changed_in, exact_kl, fresh, prompts, tiny_model

SITE, EARLY = Site(3), Site(1, "mlp_out")
LENGTHS = tuple(6 + (5 * i) % 11 for i in range(22))
SINK, SPECIAL = 5, 9
"""Token ids: one whose activation is a sink, and one that counts as special."""
PROMPTS = [
    [*(t if t not in (SINK, SPECIAL) else t + 1 for t in tokens[:2]), *([SINK] * (i % 3 == 0)), *tokens[3:]]
    for i, tokens in enumerate(prompts(LENGTHS))
]
OTHER = prompts(tuple(5 + (3 * i) % 7 for i in range(12)))


@functools.cache
def model() -> nn.Module:
    """A llama with a token that is a sink everywhere."""
    hf = fresh("llama")
    hf.model.embed_tokens.weight[SINK] *= 2e4
    return hf


def as_text(tokens: list[list[int]], name: str) -> Prompts:
    special = [[token == SPECIAL for token in ids] for ids in tokens]
    return Prompts(tokens, special, [""] * len(tokens), provenance={"name": name})


TEXTS = {"first": as_text(PROMPTS, "one"), "second": as_text(OTHER, "two")}


def standing_at(site: Site, ids: list[int]) -> torch.Tensor:
    """The activations at a site, read by a hook that is set here."""
    found = []
    remove = changed_in("llama", model(), site, lambda x: found.append(x[0].clone()) or x)
    model()(input_ids=torch.tensor([ids]))
    remove()
    return found[0]


@functools.cache
def stream(site: Site = SITE) -> list[torch.Tensor]:
    """Activations of each prompt of the first text."""
    return [standing_at(site, ids) for ids in PROMPTS]


def sample(site: Site) -> torch.Tensor:
    x = torch.cat(stream(site))
    return x[x.norm(dim=1) < 5 * x.norm(dim=1).median()]


@functools.cache
def random_sae(name: str, site: Site = SITE, seed: int = 0, d_sae: int = 48) -> SAE:
    """Of any architecture, with every parameter disturbed; a third of its latents never fires."""
    stem, _, normalise = name.partition("+")
    x = sample(site)
    g = torch.Generator().manual_seed(seed)
    sae = build(named(stem), d_sae, 8, x, g, hook_name=site.hook_name, model_name="LlamaForCausalLM")
    if normalise:
        sae.normalise = LayerNorm()
    for parameter in sae.parameters():
        size = parameter.data.abs().mean().clamp(min=0.3)
        parameter.data += 0.2 * size * torch.randn(parameter.shape, generator=g)
    sae.W_dec.data *= torch.rand(d_sae, 1, generator=g) + 0.5
    if hasattr(sae.selector, "threshold"):
        sae.selector.threshold.fill_(0.3)
    if getattr(sae.score, "b_enc", None) is not None:
        sae.score.b_enc.data[: d_sae // 3] = -1e6
    return sae.requires_grad_(False)


def plain(W_enc: torch.Tensor, W_dec: torch.Tensor, b_dec: torch.Tensor | None = None, site: Site = SITE) -> SAE:
    """z = ReLU(W_enc x), x̂ = z W_dec + b_dec."""
    b_dec = torch.zeros(W_dec.shape[1]) if b_dec is None else b_dec
    score = Inner(W_enc, torch.zeros(len(W_enc)))
    return SAE(score, ReLU(), W_dec, b_dec, subtract_b_dec=False, hook_name=site.hook_name).requires_grad_(False)


def scaled(c: float, site: Site = SITE) -> SAE:
    """x̂ = c·x, exactly: ReLU(x) − ReLU(−x) = x."""
    eye = torch.eye(D_MODEL)
    return plain(torch.cat([eye, -eye]), c * torch.cat([eye, -eye]), site=site)


SAES = {
    "standard": random_sae("standard"),
    "bypass": random_sae("bypass", SITE, 2),
    "normalised": random_sae("standard:topk+layer_norm", SITE, 3),
    "early": random_sae("cosine-feature", EARLY, 4, 32),
}


@functools.cache
def result() -> SAEEvaluation:
    """A run that tests share and do not change."""
    return evaluate_saes(model(), TEXTS, SAES, splice_prompts=14)


def evaluated(sae: SAE, **settings) -> SAEEvaluation:
    return evaluate_saes(model(), {"first": TEXTS["first"]}, {"sae": sae}, **{"splice_prompts": None, **settings})


@functools.cache
def usual() -> SAEEvaluation:
    """`standard` on all prompts of the first text."""
    return evaluated(SAES["standard"])


def line(found: SAEEvaluation, **values) -> pd.Series:
    frame = found.frame
    for name, value in values.items():
        frame = frame[frame[name] == value]
    assert len(frame) == 1
    return frame.iloc[0]


# Every number again, token by token


@functools.cache
def clean_logits(tokens: tuple[int, ...]) -> torch.Tensor:
    return model()(input_ids=torch.tensor([tokens])).logits[0].double()


def passed(site: Site, tokens: list[int], change) -> tuple[np.ndarray, np.ndarray]:
    """KL at each position and the loss of the next token, float64, of a full forward pass with `change` of the residual stream."""
    ids, clean = torch.tensor([tokens]), clean_logits(tuple(tokens))
    remove = changed_in("llama", model(), site, change)
    logits = model()(input_ids=ids).logits[0].double()
    remove()
    loss = -logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    return exact_kl(clean, logits).numpy(), loss.numpy()


@functools.cache
def by_hand(name: str, corpus: str, tokens: str, n_spliced: int = 14) -> dict[str, np.ndarray]:
    """Columns with one value a token: all that the table is computed from."""
    sae, text, site = SAES[name], TEXTS[corpus], EARLY if name == "early" else SITE
    recorded = [standing_at(site, ids) for ids in text.tokens]
    norms = [x.double().norm(dim=1).numpy() for x in recorded]
    strict = [
        (some <= 10 * np.median(np.concatenate(norms))) & ~np.array(special) & (np.arange(len(some)) >= 1)
        for some, special in zip(norms, text.special, strict=True)
    ]
    mean = torch.cat([x.double()[torch.from_numpy(k)] for x, k in zip(recorded, strict, strict=True)]).mean(0)
    columns: dict[str, list] = {}
    for p, (ids, x) in enumerate(zip(text.tokens, recorded, strict=True)):
        counted = strict[p] if tokens == NO_SINKS else np.ones(len(ids), dtype=bool)
        z, found, x64 = sae.encode(x), sae(x).double(), x.double()
        size = found.norm(dim=1)
        row = {
            "prompt": np.full(len(ids), p),
            "x": x64.numpy(),
            "z": z.double().numpy(),
            "norm": norms[p],
            "mse": (x64 - found).square().sum(1),
            "l0": (z != 0).sum(1).double(),
            "cosine": torch.where(size > 0, (x64 * found).sum(1) / x64.norm(dim=1) / size.clamp(min=1e-30), 0.0),
            "norm_ratio": size / x64.norm(dim=1),
        }
        mask = torch.from_numpy(counted)[:, None]
        for to, end in ((found, ""), (0 * found, "_zero"), (mean.expand_as(found), "_mean"), (x64, "_clean")):
            kl = loss = np.full(len(ids), np.nan)
            if p < n_spliced:
                kl, loss = passed(site, ids, lambda h, to=to, mask=mask: torch.where(mask, to.to(h), h[0])[None])
                loss = np.append(loss, np.nan)
            row |= {f"kl{end}": kl, f"ce{end}": loss}
        for key, values in row.items():
            columns.setdefault(key, []).append(np.asarray(values)[counted])
    return {key: np.concatenate(values) for key, values in columns.items()}


def chosen(rows: dict[str, np.ndarray], mask: np.ndarray) -> dict[str, np.ndarray]:
    return {key: values[mask] for key, values in rows.items()}


def statistic(name: str, rows: dict[str, np.ndarray]) -> float:
    """On rows that all have a value."""
    if name == "fve":
        return 1 - rows["mse"].sum() / ((rows["x"] - rows["x"].mean(0)) ** 2).sum()
    if "score" not in name:
        return rows[name].mean()
    kind = name[:2]
    worst = rows[f"{kind}_{'mean' if name.endswith('mean') else 'zero'}"].sum()
    best = rows["ce_clean"].sum() if kind == "ce" else 0.0
    return (worst - rows[kind].sum()) / (worst - best)


def effective(sizes: np.ndarray) -> float:
    return sizes.sum() ** 2 / (sizes**2).sum()


def jackknifed(name: str, rows: dict[str, np.ndarray]) -> tuple[float, float]:
    names, sizes = np.unique(rows["prompt"], return_counts=True)
    without = np.array([statistic(name, chosen(rows, rows["prompt"] != p)) for p in names])
    se = np.sqrt((len(names) - 1) / len(names) * ((without - without.mean()) ** 2).sum())
    value, t = statistic(name, rows), stats.t.ppf(0.975, effective(sizes) - 1)
    return value - t * se, value + t * se


@pytest.mark.parametrize(
    ("name", "corpus", "tokens"),
    [
        *(("standard", *which) for which in (("first", ALL), ("first", NO_SINKS), ("second", NO_SINKS))),
        *((name, "first", NO_SINKS) for name in ("bypass", "normalised", "early")),
    ],
)
def test_every_column_matches_a_computation_token_by_token(name, corpus, tokens):
    rows = by_hand(name, corpus, tokens)
    edges = [-1.0, *np.quantile(rows["norm"], (0.25, 0.5, 0.75)), np.inf]
    for i, quartile in enumerate(QUARTILES):
        low, high = (edges[0], edges[4]) if i == 0 else edges[i - 1 : i + 1]
        some = chosen(rows, (rows["norm"] > low) & (rows["norm"] <= high))
        read = {kind: chosen(some, np.isfinite(some[kind])) for kind in ("kl", "ce")}
        found = line(result(), sae=name, corpus=corpus, tokens=tokens, quartile=quartile)
        assert (found.n_tokens, found.n_prompts) == (len(some["norm"]), len(np.unique(some["prompt"])))
        assert found.n_effective == pytest.approx(effective(np.unique(some["prompt"], return_counts=True)[1]))
        assert found.n_tokens > 10
        for kind, part in read.items():
            counts = len(part["norm"]), len(np.unique(part["prompt"]))
            assert (found[f"n_{kind}_tokens"], found[f"n_{kind}_prompts"]) == counts
        assert (found.norm_low, found.norm_high) == pytest.approx((some["norm"].min(), some["norm"].max()), rel=1e-5)
        assert found.dead == (some["z"] != 0).sum(0).tolist().count(0)
        assert found.dead_share == found.dead / SAES[name].d_sae
        for measure in MEASURES:
            part = read.get(measure[:2], some)
            # KLs and losses of two float32 ways to one stream; others differ by the rounding of sums
            size = abs(statistic(measure, part)) + 1 if measure[:2] in read else abs(statistic(measure, part))
            close = {"abs": 2e-4 * size, "rel": 0}
            assert found[measure] == pytest.approx(statistic(measure, part), **close), measure
            if effective(np.unique(part["prompt"], return_counts=True)[1]) < 10:
                assert np.isnan(found[f"{measure}_low"])
                continue
            ends = jackknifed(measure, part)
            close["abs"] += 2e-3 * (ends[1] - ends[0])
            assert (found[f"{measure}_low"], found[f"{measure}_high"]) == pytest.approx(ends, **close), measure


@pytest.mark.parametrize("name", ["standard", "early"])
def test_latents_match_a_computation_token_by_token(name):
    sae, rows = SAES[name], by_hand(name, "first", NO_SINKS)
    z, latents = rows["z"], result().latents
    found = latents[(latents.sae == name) & (latents.corpus == "first")]
    assert found.latent.tolist() == list(range(sae.d_sae))
    np.testing.assert_array_equal(found.fired, fired := (z != 0).sum(0))
    np.testing.assert_allclose(found.frequency, fired / len(z), rtol=1e-6)
    np.testing.assert_array_equal(found[[f"fired_q{i}" for i in range(1, 5)]].sum(axis=1), fired)
    edges = np.quantile(rows["norm"], (0.5, 0.75))
    third = (rows["norm"] > edges[0]) & (rows["norm"] <= edges[1])
    np.testing.assert_array_equal(found.fired_q3, (z[third] != 0).sum(0))
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(found.mean_activation, z.sum(0) / fired, rtol=1e-4)
    assert found.mean_activation.isna().sum() == (fired == 0).sum() > 0
    for i in range(sae.d_sae):
        w, d = sae.encoder_rows()[i].double(), sae.W_dec[i].double()
        assert found.alignment.iloc[i] == pytest.approx(float(w @ d), rel=1e-4, abs=1e-6)
        assert found.cosine.iloc[i] == pytest.approx(float(w @ d / w.norm() / d.norm()), rel=1e-4, abs=1e-6)
    if name == "standard":
        assert found.exponent.isna().all()
    else:
        np.testing.assert_allclose(found.exponent, sae.score.exponents(), rtol=1e-6)
        assert found.exponent.std() > 0


@pytest.mark.parametrize("name", ["standard", "early"])
def test_deletions_match_a_computation_token_by_token(name):
    rows = by_hand(name, "first", NO_SINKS)
    found = result().deletions.query("sae == @name and corpus == 'first'").set_index("prompt")
    assert found.index.tolist() == np.unique(rows["prompt"]).tolist()
    assert found["n_tokens"].tolist() == np.bincount(rows["prompt"])[found.index].tolist()
    for prompt in (0, 3, 20):  # the last is not spliced
        some = chosen(rows, rows["prompt"] != prompt)
        for measure in MEASURES:
            part = chosen(some, np.isfinite(some[measure[:2]])) if measure[:2] in ("kl", "ce") else some
            expected = statistic(measure, part)
            assert found.loc[prompt, measure] == pytest.approx(expected, abs=2e-4 * (abs(expected) + 1)), measure
        assert found.loc[prompt, "dead_share"] == pytest.approx(((some["z"] != 0).sum(0) == 0).mean())
    latents = result().latents.query("sae == @name and corpus == 'first'")
    for i in range(SAES[name].d_sae):
        where = [*np.unique(rows["prompt"][rows["z"][:, i] != 0]), -1, -1]
        assert (latents.first_prompt.iloc[i], latents.second_prompt.iloc[i]) == tuple(where[:2])


# Between texts


def jackknife_error(statistic_of, rows) -> tuple[float, float, float]:
    """A statistic of the prompts kept, its delete-one error, and their effective number."""
    prompts, size = np.unique(rows["prompt"], return_counts=True)
    without = np.array([statistic_of(prompts[prompts != p]) for p in prompts])
    n, effective = len(prompts), size.sum() ** 2 / (size**2).sum()
    return statistic_of(prompts), np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum()), effective


def welch(first, second) -> tuple[float, float, float]:
    (a, se_a, n_a), (b, se_b, n_b) = first, second
    df = (se_a**2 + se_b**2) ** 2 / (se_a**4 / (n_a - 1) + se_b**4 / (n_b - 1))
    half = stats.t.ppf(0.975, df) * np.hypot(se_a, se_b)
    return b - a, b - a - half, b - a + half


@pytest.mark.parametrize("measure", ["fve", "l0", "kl"])
def test_shift_between_texts_matches_welchs_interval(measure):
    """`standard` alone, and `bypass` against it, whose errors are paired within each text."""
    texts = ("first", "second")
    by = {(name, text): by_hand(name, text, NO_SINKS) for name in ("standard", "bypass") for text in texts}
    finite = {key: chosen(rows, np.isfinite(rows["kl"])) if measure == "kl" else rows for key, rows in by.items()}
    prompts = {text: np.unique(finite["standard", text]["prompt"]) for text in texts}

    def of(name, text, keep):
        rows = finite[name, text]
        return statistic(measure, chosen(rows, np.isin(rows["prompt"], keep)))

    lines = {(m["sae"], m["against"]): m for m in result().shift}
    assert set(lines) == {(name, "") for name in SAES} | {("bypass", "standard"), ("normalised", "standard")}
    found = lines["standard", ""][measure]
    alone = welch(*(jackknife_error(lambda keep, t=t: of("standard", t, keep), finite["standard", t]) for t in texts))
    assert (found.value, found.low, found.high) == pytest.approx(alone, abs=2e-3 * (1 + abs(alone[0])), rel=1e-3)
    assert found.n_prompts == sum(map(len, prompts.values()))
    found = lines["bypass", "standard"][measure]
    paired = welch(
        *(
            jackknife_error(lambda k, t=t: of("bypass", t, k) - of("standard", t, k), finite["standard", t])
            for t in texts
        )
    )
    # a prompt that was not spliced is a deletion that moves nothing: a factor of √(13/14 · 22/21) at most
    assert (found.value, found.low, found.high) == pytest.approx(paired, abs=0.03 * (paired[2] - paired[1]), rel=1e-3)


# Sweeps


def test_sweeps_are_compared_in_result_and_files(tmp_path):
    """Two families of TopK SAEs: rows, interpolation on the table's numbers, JSON, figure, and back from disk."""
    saes = {}
    for name, kind, seed in (("standard", "standard:topk", 0), ("cosine", "cosine:topk", 1)):
        for k in (2, 5, 9):
            sae = random_sae(kind, seed=seed)
            saes[f"{name}-k{k}"] = SAE(
                sae.score, TopK(k), sae.W_dec, sae.b_dec, subtract_b_dec=sae.subtract_b_dec, hook_name=sae.hook_name
            )
    found = evaluate_saes(model(), {"first": TEXTS["first"]}, saes, splice_prompts=12)
    assert [f.name for f in found.families] == ["standard", "cosine"] and found.shift == []
    main = {g["sae"]: g for g in found.main}
    line = next(m for m in found.matched_at(l0=4.0) if m["axis"] == "l0")
    for side, family in zip(("of_reference", "of_family"), found.families, strict=True):
        x = np.log([main[name]["l0"].value for name in family.saes])
        for measure in ("fve", "kl_score", "ce"):
            expected = np.interp(np.log(4), x, [main[name][measure].value for name in family.saes])
            assert line[side][measure] == pytest.approx(expected)
    assert (
        line["kl_score"].n_prompts == 12
        and np.isfinite(line["kl_score"].low)
        and line["kl_score"].low < line["kl_score"].high
    )
    assert "cosine − standard" in found.table()
    assert any("at equal L0" in h.what for h in found.headlines())
    assert "sae_sweeps" in found.figures()
    plt.close("all")
    found.write(tmp_path)
    again = SAEEvaluation.load(tmp_path)
    pd.testing.assert_frame_equal(again.deletions, found.deletions)
    assert jsonable(again.matched) == jsonable(found.matched)
    written = json.loads((tmp_path / "sae_evaluation.json").read_text())
    assert written["matched"] == jsonable(found.matched)
    assert result().families == [] and "family − reference" not in result().table()


# What is known beforehand


@pytest.mark.parametrize("c", [1.0, 0.5, -1.0, 0.0])
def test_scaled_reconstructions_have_known_scores(c):
    """x̂ = c·x: the identity, shrinkage, a change of sign, zero ablation."""
    found = evaluated(scaled(c), splice_prompts=None if c in (0, 1) else 2)
    x = torch.cat(stream()).double()
    row = line(found, tokens=ALL, quartile="all")
    share = (1 - c) ** 2 * x.square().sum() / (x - x.mean(0)).square().sum()
    assert row.fve == pytest.approx(float(1 - share), rel=1e-5)
    assert row.mse == pytest.approx(float((1 - c) ** 2 * x.square().sum(1).mean()), rel=1e-5, abs=1e-6)
    for row in found.frame.itertuples():
        assert (row.cosine, row.norm_ratio) == pytest.approx((np.sign(c), abs(c)), rel=1e-5, abs=1e-6)
        assert row.l0 == pytest.approx(D_MODEL) and row.dead_share == 0
        if c == 1:
            assert row.kl_score == row.kl_score_mean == pytest.approx(1, abs=TOLERANCE) and row.kl < TOLERANCE**2
            assert row.ce_score == pytest.approx(1, abs=1e-3) and row.ce == pytest.approx(row.ce_clean, abs=TOLERANCE)
        if c == 0:
            assert row.kl == row.kl_zero > 0.01 and row.ce == row.ce_zero and row.kl_score == row.ce_score == 0


def test_mean_reconstruction_is_mean_ablation():
    x, ids = torch.cat(stream()), torch.tensor([t for ids in PROMPTS for t in ids])
    kept = x[(ids != SPECIAL) & (x.norm(dim=1) <= 10 * x.norm(dim=1).median())]
    mean = kept.double().mean(0).float()
    found = evaluated(plain(torch.eye(D_MODEL), torch.zeros(D_MODEL, D_MODEL), mean), skip_first=0)
    row = line(found, tokens=NO_SINKS, quartile="all")
    assert row.fve == pytest.approx(0, abs=1e-6)
    for quartile in QUARTILES[1:]:
        assert line(found, tokens=NO_SINKS, quartile=quartile).fve < 0  # each has a mean of its own
    for row in found.frame.itertuples():
        assert row.kl == pytest.approx(row.kl_mean, rel=1e-3, abs=1e-5)
        assert row.kl_score_mean == pytest.approx(0, abs=1e-3)
        assert row.ce == pytest.approx(row.ce_mean, abs=1e-3)


# Sinks


@pytest.mark.parametrize("skip", [0, 2])
def test_sinks_special_and_first_tokens_are_left_out(skip):
    found = evaluated(scaled(1.0), skip_first=skip, splice_prompts=2)
    first, flat = [t for ids in PROMPTS for t in ids[:skip]], [t for ids in PROMPTS for t in ids]
    counts = found.provenance["left_out"]["first"][str(SITE)]
    assert counts["sinks"] == flat.count(SINK) > 3 and f"{flat.count(SINK)} (sinks" in found.table()
    assert counts["special tokens"] == flat.count(SPECIAL) > 0
    lost, usual = (sum(t not in (SINK, SPECIAL) for t in some) for some in (first, flat))
    assert counts.get(f"first {skip} of a prompt", 0) == lost and bool(lost) == bool(skip)
    assert line(found, tokens=ALL, quartile="all").n_tokens == len(flat)
    assert line(found, tokens=NO_SINKS, quartile="all").n_tokens == usual - lost


@pytest.mark.parametrize("sink_filter", [None, 0])
def test_without_a_sink_filter_all_tokens_count(sink_filter):
    found = evaluated(SAES["standard"], sink_filter=sink_filter)
    assert set(found.frame.tokens) == {ALL} and found.counted == ALL and found.latents.frequency.max() <= 1
    every = usual().frame.query(f"tokens == '{ALL}'").reset_index(drop=True)
    same = [c for c in every if "mean" not in c]  # with the filter, the mean is over tokens that are no sinks
    pd.testing.assert_frame_equal(found.frame[same], every[same])


def test_splice_sinks_replaces_them_without_counting_them():
    sae = SAES["standard"]
    found, usual = (evaluated(sae, splice_sinks=s, skip_first=0) for s in (True, False))
    one, other = (line(f, tokens=NO_SINKS, quartile="all") for f in (found, usual))
    assert one.n_kl_tokens == other.n_kl_tokens
    assert abs(one.kl - other.kl) > 1e-3
    every = line(usual, tokens=ALL, quartile="all")
    flat = torch.tensor([t for tokens in PROMPTS for t in tokens])
    kl = torch.cat([torch.from_numpy(passed(SITE, tokens, lambda x: sae(x).to(x))[0]) for tokens in PROMPTS])
    assert every.kl == pytest.approx(float(kl.mean()), rel=1e-4)
    assert one.kl == pytest.approx(float(kl[(flat != SINK) & (flat != SPECIAL)].mean()), rel=1e-4)


def test_text_without_sinks_needs_one_pass(monkeypatch):
    calls, real = [], sae_measures.spliced
    monkeypatch.setattr(sae_measures, "spliced", lambda *a, **k: calls.append(a[1]) or real(*a, **k))
    seen = []
    quiet = [[t for t in tokens if t not in (SINK, SPECIAL)] for tokens in PROMPTS]
    how = {"skip_first": 0, "splice_prompts": 5, "progress": lambda *a: seen.append(a)}
    found = evaluate_saes(tiny_model("llama"), quiet, [scaled(0.7)], **how)
    assert len(calls) == 1
    one, other = (found.frame[found.frame.tokens == t].drop(columns="tokens") for t in (ALL, NO_SINKS))
    pd.testing.assert_frame_equal(one.reset_index(drop=True), other.reset_index(drop=True))
    evaluated(scaled(0.7), splice_prompts=5)
    assert len(calls) == 3
    assert sum(n for n, _ in seen) == 5 * 3 * 2 == seen[0][1]  # prompts × (SAE, zero, mean) × tokens


# Bounds, prompts, chunks


def test_spliced_prompts_are_the_first():
    few = evaluated(SAES["standard"], splice_prompts=12)
    row, whole = (line(f, tokens=NO_SINKS, quartile="all") for f in (few, usual()))
    assert (row.n_kl_prompts, whole.n_kl_prompts, row.n_prompts) == (12, 22, 22)
    rows = by_hand("standard", "first", NO_SINKS)
    assert row.kl == pytest.approx(rows["kl"][rows["prompt"] < 12].mean(), rel=1e-4)
    assert row.fve == whole.fve


def test_results_do_not_depend_on_the_chunk_size(monkeypatch):
    whole = usual()
    monkeypatch.setattr(sae_measures, "CHUNK", 7 * SAES["standard"].d_sae)
    pieces = []
    real = SAE.encode
    monkeypatch.setattr(SAE, "encode", lambda self, x: pieces.append(len(x)) or real(self, x))
    found = evaluated(SAES["standard"])
    assert max(pieces) == 7
    pd.testing.assert_frame_equal(found.frame, whole.frame, rtol=1e-4, atol=1e-6)
    pd.testing.assert_frame_equal(found.latents, whole.latents, rtol=1e-5)


def test_few_prompts_have_no_interval():
    found = evaluate_saes(model(), as_text(PROMPTS[:6], "few"), [SAES["standard"]], splice_prompts=2)
    assert found.corpora == ["few"] and found.table()
    assert found.frame.fve.notna().all() and found.frame.fve_low.isna().all() and found.frame.kl_score_high.isna().all()


def test_half_precision_models_and_saes_are_measured_in_float32():
    half = fresh("llama", dtype=torch.bfloat16)
    text = as_text(PROMPTS, "half")
    sae = scaled(1.0).to(torch.bfloat16)
    sae.model_name = None
    found = evaluate_saes(half, text, [sae], splice_prompts=4)
    assert found.frame.fve.min() == 1  # a bfloat16 vector passes unchanged
    assert found.frame.kl.max() < 1e-6


def test_token_ids_and_unnamed_saes_are_accepted():
    found = evaluate_saes(model(), PROMPTS, [scaled(1.0), scaled(0.5), SAES["early"]], splice_prompts=1)
    assert found.names == [
        "inner:relu 64 blocks.3.hook_resid_post",
        "inner:relu 64 blocks.3.hook_resid_post #2",
        "cosine:batchtopk 32 blocks.1.hook_mlp_out",
    ]
    assert found.frame.sae.unique().tolist() == found.latents.sae.unique().tolist() == found.names
    assert found.corpora == ["given"] and found.tokens == PROMPTS
    assert found.provenance["left_out"]["given"][str(SITE)]["special tokens"] == 0


# Alignment


def test_a_tokenizers_output_is_one_corpus():
    given = {"input_ids": [[1, 2]], "attention_mask": [[1, 1]]}
    assert _corpora(given) == {"given": given} and _corpora({"a": given}) == {"a": given}


def test_bimodality_of_known_distributions():
    n = 200_001
    even = (np.arange(n) + 0.5) / n
    known = ((even, UNIFORM), (stats.norm.ppf(even), 1 / 3), (np.repeat([0.0, 1.0], n), 1))
    for x, expected in known:
        assert bimodality(x) == pytest.approx(expected, abs=1e-3)
    for x in (np.ones(50), 1 + 1e-8 * even, np.arange(3.0), np.zeros(0)):
        assert np.isnan(bimodality(x))


def test_bimodality_is_sarles_coefficient_of_a_small_sample():
    x = np.array([0.1, 0.15, 0.2, 0.9, 1.0, 1.3, 0.12])
    n, m = len(x), [((x - x.mean()) ** k).mean() for k in range(5)]
    skew = np.sqrt(n * (n - 1)) / (n - 2) * m[3] / m[2] ** 1.5
    excess = (n - 1) / (n - 2) / (n - 3) * ((n + 1) * (m[4] / m[2] ** 2 - 3) + 6)
    assert bimodality(x) == pytest.approx((skew**2 + 1) / (excess + 3 * (n - 1) ** 2 / (n - 2) / (n - 3)))
    assert bimodality(7 - 3 * x) == pytest.approx(bimodality(x))


def test_alignment_counts_latents_that_fire_on_any_text():
    for facts in result().alignments:
        sae = SAES[facts["sae"]]
        latents = result().latents[result().latents.sae == facts["sae"]]
        fired = latents.groupby("latent").fired.sum().to_numpy() > 0
        x = sae.alignment().numpy()[fired]
        assert (facts["latents"], facts["live"]) == (sae.d_sae, fired.sum())
        assert facts["alignment"] == pytest.approx(x.mean(), rel=1e-5)
        assert facts["alignment sd"] == pytest.approx(x.std(), rel=1e-4)
        assert facts["alignment < 0.5"] == (x < 0.5).mean()
        assert facts["alignment bimodality"] == pytest.approx(bimodality(x.astype(float)), rel=1e-3, nan_ok=True)
        if facts["sae"] == "early":
            a = sae.score.exponents().numpy()[fired]
            assert (facts["exponent"], facts["exponent sd"]) == pytest.approx((a.mean(), a.std()), rel=1e-4)
        else:
            assert np.isnan(facts["exponent"])


def test_aligned_saes_have_alignment_1():
    facts = evaluated(random_sae("aligned", SITE, 6), splice_prompts=1).alignments[0]
    assert facts["alignment"] == pytest.approx(1, abs=1e-5) and facts["cosine"] < 1
    assert np.isnan(facts["alignment bimodality"])


# Errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hook_name": None}, BelongingError, "does not say where it belongs"),
        ({"hook_name": "blocks.6.hook_resid_post"}, SiteError, "no block 6"),
        ({"model_name": "gpt2"}, BelongingError, "'gpt2'"),
        ({"metadata": {"weights_sha256": "0" * 64}}, BelongingError, "weights 000000000000"),
        (None, BelongingError, "width 16 for activations of width 32"),
    ],
)
def test_misplaced_sae_raises_before_the_model_runs(monkeypatch, change, error, message):
    monkeypatch.setattr(sae_evaluation, "record", lambda *a, **k: pytest.fail("the model ran"))
    sae = plain(torch.eye(16), torch.eye(16)) if change is None else scaled(1.0)
    for name, value in (change or {}).items():
        setattr(sae, name, value)
    with pytest.raises(error, match=message):
        evaluate_saes(model(), TEXTS, {"good": SAES["standard"], "bad": sae})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"saes": []}, "no SAE and no directions; give at least one"),
        ({"prompts": {}}, "no text; give at least one"),
        ({"sink_filter": -1}, "sink filter -1"),
        ({"splice_prompts": 0}, "0 spliced prompts"),
        ({"sink_filter": 1e-6}, "no token is left at 3.resid_post"),
    ],
)
def test_invalid_arguments_raise(given, message):
    with pytest.raises(ResultError, match=message):
        evaluate_saes(**{"model": model(), "prompts": TEXTS, "saes": [SAES["standard"]], **given})


@pytest.mark.filterwarnings("ignore:the blocks above")
def test_nonfinite_activations_are_left_out_and_counted():
    hf = fresh("llama")
    hf.model.embed_tokens.weight[7] = torch.nan
    text = [[t if t != 7 else 8 for t in tokens] for tokens in PROMPTS]
    for tokens in text[:4]:
        tokens[-1] = 7
    recording = record(hf, text, [SITE])
    rows = zip(recording.activations[SITE], recording.length, strict=True)
    bad = sum(int((~x[:n].isfinite()).any(-1).sum()) for x, n in rows)  # attention carries 0·nan to earlier positions
    found = evaluate_saes(hf, text, [scaled(0.8)], splice_prompts=None)
    assert found.provenance["left_out"]["given"][str(SITE)]["not finite or of norm 0"] == bad >= 4
    row = line(found, tokens=ALL, quartile="all")
    assert row.n_tokens == row.n_kl_tokens == sum(map(len, text)) - bad
    assert np.isfinite(found.frame[[*MEASURES]]).all(axis=None)
    assert f"{bad} (not finite" in found.table()


# The result


def test_one_line_for_each_sae_corpus_tokens_and_quartile():
    frame = result().frame
    keys = ["sae", "corpus", "tokens", "quartile"]
    assert len(frame) == len(SAES) * 2 * 2 * 5 == len(frame.drop_duplicates(keys))
    assert frame.sae.unique().tolist() == list(SAES)
    assert set(frame[frame.sae == "early"].site) == {"1.mlp_out"}
    assert len(result().latents) == 2 * sum(sae.d_sae for sae in SAES.values())
    assert len(result().summary()) == len(SAES) * 2
    for group in result().select(quartile="Q2", tokens=ALL, sae="bypass"):
        row = line(result(), sae="bypass", corpus=group["corpus"], tokens=ALL, quartile="Q2")
        assert (group["fve"].value, group["fve"].n_rows) == (row.fve, row.n_tokens)
        assert (group["fve"].low, group["ce_score"].high) == pytest.approx(
            (row.fve_low, row.ce_score_high), nan_ok=True
        )
        assert (group["ce_score"].n_prompts, group["ce_score"].n_effective) == (row.n_ce_prompts, row.n_ce_effective)
    table = result().table()
    for word in (*SAES, "first", "second", "KL score", "bimodality", "1.mlp_out"):
        assert word in table
    assert "<table" in result()._repr_html_()


def test_provenance():
    p = result().provenance
    assert p["saes"]["early"] | {"site": "1.mlp_out", "d_sae": 32, "score": "cosine"} == p["saes"]["early"]
    assert p["saes"]["early"]["selector"] == {"kind": "batchtopk", "k": 8}
    assert p["saes"]["normalised"]["normalise"] == {"kind": "layer_norm"}
    assert p["sites"] == ["3.resid_post", "1.mlp_out"]
    assert p["path"] == {"3.resid_post": "blocks", "1.mlp_out": "blocks"}
    assert p["path_delta"] <= TOLERANCE
    assert p["texts"]["second"] == {"name": "two", "prompts": len(OTHER), "tokens": sum(map(len, OTHER))}
    assert {"weights_sha256", "threads", "versions", "sink_filter", "splice_prompts"} <= set(p)
    assert result().points == ["resid_post", "mlp_out"]


def test_hooks_match_blocks():
    one, other = (evaluated(SAES["standard"], path=path, splice_prompts=6) for path in ("blocks", "hooks"))
    assert other.provenance["path"] == {str(SITE): "hooks"}
    pd.testing.assert_frame_equal(one.frame, other.frame, rtol=1e-3, atol=1e-4)


def test_result_roundtrip(tmp_path, monkeypatch):
    monkeypatch.setattr(SAEEvaluation, "figures", lambda self: {})  # test_names_in_figures draws them
    run = evaluate_saes(model(), TEXTS, {"early": SAES["early"]}, splice_prompts=2)
    assert set(run.write(tmp_path)) == {*SAEEvaluation.files()} == {path.name for path in tmp_path.iterdir()}
    loaded = SAEEvaluation.load(tmp_path)
    for name in ("frame", "latents", "deletions"):
        pd.testing.assert_frame_equal(getattr(loaded, name), getattr(run, name), check_exact=True)
    assert (loaded.tokens, loaded.names, loaded.table()) == (run.tokens, run.names, run.table())
    text = json.loads((tmp_path / "sae_evaluation.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    assert set(text) == {"summary", "alignment", "matched", "shift", "provenance", "figures", "sha256"}
    assert len(text["summary"]) == len(run.frame) and text["summary"] == jsonable(run.groups)


class Foreign(torch.nn.Module):
    """An SAE of another library, of which only `encode` and `decode` are known."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.W_dec = torch.nn.Parameter(torch.randn(20, D_MODEL, generator=generator))
        self.hook_name, self.model_name = f"blocks.{SITE.layer}.hook_resid_post", None

    def encode(self, x):
        return (x @ self.W_dec.T).relu()

    def decode(self, z):
        return z @ self.W_dec


def test_a_foreign_object_has_no_alignment():
    found = evaluated(Foreign())
    assert found.latents["alignment"].isna().all() and np.isfinite(line(found, tokens=NO_SINKS, quartile="all").fve)
    assert "sae" in found.table() and list(found.figures()) == ["sae_evaluation"]
    plt.close("all")
