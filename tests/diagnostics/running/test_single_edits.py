"""What a run of single edits adds to single measurements (shards, units, contexts, randomly initialised models, horizons) changes no number."""

import functools
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from torch import nn

from diagnostics.direction_vs_norm.result import DirectionNorm
from diagnostics.direction_vs_norm.run import direction_norm
from diagnostics.results.result import Result
from diagnostics.running import recordings
from diagnostics.running import single_edits as study
from diagnostics.running.clean import CONTEXTS, METRICS, CleanActivations, RunSettings
from diagnostics.running.single_edits import EditedRows, run_single_edits
from diagnostics.running.units import Interrupted, code_version
from diagnostics.sampling.tokens import generator
from interventions import MechdiagError, Reference, ResultError, Site, measure, record, wrap
from interventions.edits import random_like
from interventions.files import write_frame
from interventions.models.loading import untrained
from interventions.texts.prompts import as_prompts
from tests.tiny import (
    D_MODEL,
    N_LAYERS,
    TOLERANCE,
    assert_same_effect,
    exact_kl,
    forward_alone,
    fresh,
    points,
    prompts,
    tiny_model,
)

LENGTHS = tuple(20 + (7 * i) % 21 for i in range(24))
PROMPTS = prompts(LENGTHS)
MANY = prompts(tuple(6 + i % 5 for i in range(70)))
"""more than a shard of 64"""
SITES = (Site(1, "attn_out"), Site(3), Site(5))
PLACEBOS = ("placebo_direction", "placebo_token")
KEYS = ["model", "layer", "point", "context"]


# A design of its own


class EveryThird:
    """Every third usable token, moved by a noise of its own and doubled."""

    def __init__(self, clean: CleanActivations):
        self.clean = clean
        self.prompt, self.position = (x[::3] for x in clean.tokens)
        self.found = {"tokens": len(self.prompt)}

    def _chosen(self, among: np.ndarray | None) -> np.ndarray:
        return np.arange(len(self.prompt)) if among is None else np.flatnonzero(np.isin(self.prompt, among))

    def count(self, site: Site, among: np.ndarray | None, null: bool = False) -> int:
        return 2 * len(self._chosen(among))

    def rows(self, site: Site, among: np.ndarray | None) -> EditedRows:
        chosen = self._chosen(among)
        prompt, position = self.prompt[chosen], self.position[chosen]
        x = self.clean.at(site, prompt, position)
        noise = random_like(torch.empty(len(self.prompt), D_MODEL), generator(0, "third", site))[chosen]
        size = x.norm(dim=-1, keepdim=True) / D_MODEL**0.5
        edited = torch.stack([x + 0.5 * size * noise, 2 * x], dim=1)
        table = pd.DataFrame(
            {
                "token": chosen.repeat(2),
                "edit": ["noise", "double"] * len(chosen),
                "target_prompt": prompt.repeat(2),
                "target_position": position.repeat(2),
            }
        )
        return EditedRows(table, edited.flatten(0, 1), x[:, None].expand_as(edited).flatten(0, 1))


class Thirds(Result):
    """What became of these rows."""

    NAME = "every_third"


def third(model, tokens=PROMPTS, sites=SITES, folder=None, progress=None, overwrite=False, **settings) -> Thirds:
    return run_single_edits(
        Thirds,
        model,
        tokens,
        EveryThird,
        RunSettings(sites=tuple(sites), **settings),
        {"step": 3},
        {"token": (), "edit": ("noise", "double")},
        folder=folder,
        progress=progress,
        overwrite=overwrite,
    )


def some(frame: pd.DataFrame, **values) -> pd.DataFrame:
    for name, value in values.items():
        frame = frame[frame[name] == value]
    return frame


def at(frame: pd.DataFrame, site: Site, **values) -> pd.DataFrame:
    return some(frame, layer=site.layer, point=site.point, **values).reset_index(drop=True)


def vectors(model, tokens, site: Site) -> EditedRows:
    """The design's rows at one site, by the design itself."""
    clean = CleanActivations(wrap(model), as_prompts(tokens, None), RunSettings(sites=(site,)))
    return EveryThird(clean).rows(site, None)


def tensor(values) -> torch.Tensor:
    return torch.tensor(np.asarray(values))


def assert_close(frame: pd.DataFrame, expected: pd.DataFrame) -> None:
    """The same rows; effects of float32 logits that differ by rounding."""
    drawn = [name for name in expected if name not in METRICS and not name.startswith("kl_at_")]
    pd.testing.assert_frame_equal(frame[drawn], expected[drawn], check_exact=True)
    for name in ("kl", "js", "kl_direct"):
        assert_same_effect(tensor(frame[name]), tensor(expected[name]), TOLERANCE)
    np.testing.assert_allclose(frame.clean_entropy, expected.clean_entropy, atol=TOLERANCE)
    assert (frame.top1_changed != expected.top1_changed).mean() <= 0.01


# EditedRows are what `measure` gives


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rows_match_measure(name):
    frame = third(tiny_model(name)).frame
    recording = record(tiny_model(name), PROMPTS, SITES)
    for site in SITES:
        rows, found = vectors(tiny_model(name), PROMPTS, site), at(frame, site)
        prompt, position = (torch.tensor(rows.table[f"target_{x}"].to_numpy()) for x in ("prompt", "position"))
        effects = measure(recording, site, prompt, position, rows.vectors, metrics=METRICS)
        pd.testing.assert_frame_equal(found[list(rows.table)], rows.table, check_dtype=False)
        for metric in METRICS:
            np.testing.assert_array_equal(found[metric], effects[metric].numpy())
        assert (found.kl > 0.01).mean() > 0.3


def test_single_token_rows_match_measure():
    frame = third(tiny_model("llama"), contexts=("single_token",)).frame
    for site in SITES:
        rows, found = vectors(tiny_model("llama"), PROMPTS, site), at(frame, site)
        zero = torch.zeros(len(rows.table), dtype=torch.long)
        reference = Reference(rows.clean, torch.arange(len(zero)))
        alone = record(tiny_model("llama"), [[0]], [site])
        effects = measure(alone, site, zero, zero, rows.vectors, metrics=METRICS, reference=reference)
        assert_close(found, found.assign(**{metric: effects[metric].numpy() for metric in METRICS}))


# Shards, and the order of the table


def test_rows_do_not_depend_on_shard_size(monkeypatch):
    tables = []
    for size in (1000, 64, 16):
        monkeypatch.setattr(recordings, "SHARD", size)
        tables.append(third(tiny_model("llama"), MANY, SITES[:2], contexts=CONTEXTS).frame)
    assert len(tables[0]) == 2 * 2 * 2 * len(np.unique(tables[0].token))
    for table in tables[1:]:
        assert_close(table, tables[0])


def test_table_is_sorted_by_place_then_design_columns():
    sites = (Site(3), Site(1, "attn_out"), Site(3, "attn_out"))
    frame = third(tiny_model("llama"), MANY, sites, contexts=CONTEXTS, null_seeds=1).frame
    order = {
        "model": ["trained", "random 0"],
        "layer": [3, 1],
        "point": ["resid_post", "attn_out"],
        "context": list(CONTEXTS),
        "token": list(range(frame.token.max() + 1)),
        "edit": ["noise", "double"],
    }
    assert list(frame)[: len(order)] == list(order)
    places = list(zip(*(frame[name].map(values.index) for name, values in order.items()), strict=True))
    assert places == sorted(set(places))
    assert frame.target_prompt.max() >= 64
    kinds = {name: str(kind) for name, kind in frame.dtypes.items()}
    assert {kinds[name] for name in ("layer", "token", "target_prompt")} == {"int32"}
    assert {kinds[name] for name in ("kl", "js", "clean_entropy", "kl_direct")} == {"float32"}
    assert kinds["top1_changed"] == "bool"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rows_do_not_depend_on_cache_size(name):
    """Keys and values of both shards are kept, or of one at a time."""
    runs = [third(tiny_model(name), MANY, SITES[:2], cache_bytes=size).frame for size in (4 * 2**30, 0)]
    for run in runs[1:]:
        pd.testing.assert_frame_equal(run, runs[0], check_exact=True)


def test_joint_sites_match_single_site_runs():
    sites = [Site(2, "attn_out"), Site(2), Site(5, "attn_out"), Site(5, "mlp_out")]
    settings = {"pairs": 12, "context": "both", "sink_filter": None, "seed": 2}
    together = direction_norm(tiny_model("llama"), PROMPTS, sites=sites, **settings)
    assert together.points == ["attn_out", "resid_post", "mlp_out"]
    for site in sites:
        alone = direction_norm(tiny_model("llama"), PROMPTS, sites=[site], **settings).frame
        found = at(together.frame, site)
        same = [name for name in found if name != "norm_of_median"]  # the largest over the sites of a run
        pd.testing.assert_frame_equal(found[same], alone[same], check_exact=True)
        assert (alone.norm_of_median <= found.norm_of_median).all()


# Units


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in (folder / "units").glob("*.parquet")}


def saved(frame: pd.DataFrame, folder: Path) -> bytes:
    write_frame(folder / "frame.parquet", frame)
    return (folder / "frame.parquet").read_bytes()


def labels(path: Path) -> dict:
    return json.loads(pq.read_schema(path).metadata[b"mechdiag"])["labels"]


def without_delta(run: DirectionNorm) -> dict:
    """All of the provenance but how far replay was off where it was compared, which depends on where this run began."""
    assert 0 < run.provenance["replay_delta"] < TOLERANCE
    return {**run.provenance, "replay_delta": None}


SWEEP = {"sites": [Site(1, "attn_out"), Site(4)], "pairs": 40, "context": "both", "null_seeds": 1, "seed": 3}
UNITS = 2 * 2 * (2 + 1)
"""models × sites × (shards in place, one as a single token)"""


@functools.cache
def undisturbed() -> DirectionNorm:
    return direction_norm(tiny_model("llama"), MANY, **SWEEP)


@pytest.fixture
def measured(monkeypatch):
    """The sites of each call of `measure` by a study."""
    calls = []
    monkeypatch.setattr(study, "measure", lambda *a, **k: calls.append(a[1]) or measure(*a, **k))
    return calls


def test_deleted_units_are_recomputed_to_the_same_table(tmp_path, measured):
    first = direction_norm(tiny_model("llama"), MANY, folder=tmp_path, **SWEEP)
    assert len(everything(tmp_path)) == len(measured) == UNITS
    expected = saved(first.frame, tmp_path)
    assert expected == saved(undisturbed().frame, tmp_path)
    paths = sorted((tmp_path / "units").glob("*.parquet"))
    for n in (5,):
        gone = [paths[i] for i in np.random.default_rng(0).permutation(UNITS)[:n]]
        for path in gone:
            path.unlink()
        kept, before = everything(tmp_path), len(measured)
        again = direction_norm(tiny_model("llama"), MANY, folder=tmp_path, **SWEEP)
        assert len(measured) - before == n
        assert saved(again.frame, tmp_path) == expected
        assert without_delta(again) == without_delta(first)
        assert {name: now for name, now in everything(tmp_path).items() if name in kept} == kept
        assert len(everything(tmp_path)) == UNITS
    done = len(measured)
    direction_norm(tiny_model("llama"), MANY, folder=tmp_path, **SWEEP)
    assert len(measured) == done  # and nothing where nothing is missing


@pytest.mark.parametrize("after", [1, 6, 10])
def test_interrupted_study_resumes(tmp_path, measured, after):
    ticks = []

    def interrupts(n: int, total: int) -> None:
        ticks.append(n)
        if len(ticks) > after:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=f"of {UNITS} units are kept in .*; the same command goes on") as stopped:
        direction_norm(tiny_model("llama"), MANY, folder=tmp_path, progress=interrupts, **SWEEP)
    kept = everything(tmp_path)
    assert (after > 1) <= len(kept) == stopped.value.kept < UNITS
    before = len(measured)
    whole = direction_norm(tiny_model("llama"), MANY, folder=tmp_path, **SWEEP)
    assert len(measured) - before == UNITS - len(kept)
    assert saved(whole.frame, tmp_path) == saved(undisturbed().frame, tmp_path)
    assert without_delta(whole) == without_delta(undisturbed())
    assert {name: now for name, now in everything(tmp_path).items() if name in kept} == kept


def test_interruption_without_a_folder_promises_no_resume():
    def interrupts(n: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted) as stopped:
        third(tiny_model("llama"), progress=interrupts)
    assert str(stopped.value) == "interrupted"


@pytest.mark.filterwarnings("ignore:mechdiag falls back to full forward passes")
@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "gemma3",
        "bloom",
        "mpt",
    ],
)
def test_a_unit_does_not_depend_on_those_before_it(name, tmp_path):
    """A resumed run can start at any unit, also where replay is exact at one site and not at another."""
    sites = (Site(0), Site(N_LAYERS - 1))
    whole = third(fresh(name), PROMPTS[:6], sites, tmp_path)
    for path in sorted((tmp_path / "units").glob("*.parquet")):
        path.unlink()
        again = third(fresh(name), PROMPTS[:6], sites, tmp_path)
        pd.testing.assert_frame_equal(again.frame, whole.frame, check_exact=True)


def test_progress_counts_rows_once_and_stored_ones_apart(tmp_path):
    class Seen:
        def __init__(self):
            self.now, self.before, self.totals = 0, 0, set()

        def __call__(self, n: int, total: int) -> None:
            self.now += n
            self.totals.add(total)

        def initial(self, n: int, total: int) -> None:
            self.before += n
            self.totals.add(total)

    first, second = Seen(), Seen()
    rows = len(third(tiny_model("llama"), MANY, folder=tmp_path, progress=first).frame)
    assert (first.now, first.before, first.totals) == (rows, 0, {rows})
    paths = sorted((tmp_path / "units").glob("*.parquet"))
    missing = sum(len(pd.read_parquet(path)) for path in paths[:2])
    for path in paths[:2]:
        path.unlink()
    third(tiny_model("llama"), MANY, folder=tmp_path, progress=second)
    assert (second.now, second.before, second.totals) == (missing, rows - missing, {rows})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "settings.seed was 0, is 1"),
        ({"horizon": 2}, "settings.horizon was 1, is 2"),
        ({"sink_filter": None}, "settings.sink_filter was 10.0, is null"),
        ({"sites": SITES[:2]}, "settings.sites was"),
        ({"contexts": CONTEXTS}, "settings.contexts was"),
        ({"null_seeds": 1}, "settings.null_seeds was 0, is 1"),
        ({"batch_rows": 9}, "settings.batch_rows was null, is 9"),
        ({"path": "hooks"}, 'settings.path was "auto", is "hooks"'),
        ({"metrics": ("kl",)}, "settings.metrics was"),
        ({"tokens": PROMPTS[1:]}, "tokens was"),
    ],
)
def test_units_of_other_settings_raise_unless_overwritten(tmp_path, change, said):
    few = {"tokens": PROMPTS[:8], "sites": SITES[1:]}
    third(tiny_model("llama"), folder=tmp_path, **few)
    before = everything(tmp_path)
    with pytest.raises(
        ResultError, match=r"holds units of another run: .*; name another folder, or pass --overwrite"
    ) as no:
        third(tiny_model("llama"), folder=tmp_path, **{**few, **change})
    assert said in str(no.value)
    assert everything(tmp_path) == before
    if change == {"seed": 1}:
        third(tiny_model("llama"), folder=tmp_path, overwrite=True, **{**few, **change})
        assert not set(everything(tmp_path)) & set(before)


def test_run_identity_has_weights_but_not_cache_size(tmp_path):
    few = {"tokens": PROMPTS[:8], "sites": SITES[1:], "folder": tmp_path}
    third(tiny_model("llama"), **few)
    before = everything(tmp_path)
    third(tiny_model("llama"), cache_bytes=0, **few)
    assert everything(tmp_path) == before
    other = fresh("llama")
    other.model.layers[2].mlp.up_proj.weight[0, 0] += 1e-3
    with pytest.raises(ResultError, match="weights_sha256 was"):
        third(other, **few)
    assert json.loads((tmp_path / "run.json").read_text())["code"] == code_version()


# Randomly initialised models


def with_a_sink(token: int = 5):
    hf = fresh("llama")
    hf.model.embed_tokens.weight[token] *= 300
    return hf


# The target of the first pair is a sink of the trained model.
NULLS = {"layers": [1, 4], "pairs": 120, "context": "both", "pair_sets": ("random",)}


@functools.cache
def beside_untrained() -> DirectionNorm:
    return direction_norm(with_a_sink(PROMPTS[21][16]), PROMPTS, null_seeds=2, **NULLS)


def test_randomly_initialised_models_have_rows_of_the_same_pairs():
    frame = beside_untrained().frame
    assert list(dict.fromkeys(frame.model)) == ["trained", "random 0", "random 1"]
    assert beside_untrained().null_models == beside_untrained().provenance["null_models"] == ["random 0", "random 1"]
    place = ["pair", "target_prompt", "target_position", "source_prompt", "source_position"]
    tables = {
        model: some(frame, model=model, pair_set="random", edit="norm", layer=1, context="in_place")[place]
        for model in ("trained", "random 0", "random 1")
    }
    for model in ("random 0", "random 1"):
        both = tables["trained"].merge(tables[model], on="pair", suffixes=("", "_other"))
        assert len(both) == len(tables["trained"]) < len(tables[model])  # the sink is the trained model's own
        for name in place[1:]:
            np.testing.assert_array_equal(both[name], both[f"{name}_other"])
        drawn = beside_untrained().provenance["drawn"]
        assert drawn[model]["pairs_dropped"].get("sink", 0) < drawn["trained"]["pairs_dropped"]["sink"]
        assert drawn[model]["pair_sets"]["random"]["1.resid_post"]["used"] == len(tables[model])


@pytest.mark.parametrize("seed", [0, 1])
def test_randomly_initialised_rows_match_a_separate_run(seed):
    other = untrained(wrap(with_a_sink(PROMPTS[21][16])), seed)
    alone = direction_norm(other, PROMPTS, **NULLS)
    found = some(beside_untrained().frame, model=f"random {seed}").reset_index(drop=True)
    pd.testing.assert_frame_equal(found.assign(model="trained"), alone.frame, check_exact=True, check_dtype=False)
    assert beside_untrained().provenance["drawn"][f"random {seed}"] == alone.provenance["drawn"]["trained"]
    of_null = {f"random {seed}: {reason}": n for reason, n in alone.provenance["rows_dropped"].items()}
    said = beside_untrained().provenance["rows_dropped"]
    assert {reason: n for reason, n in said.items() if reason.startswith(f"random {seed}")} == of_null


def test_randomly_initialised_models_are_reproducible():
    again = direction_norm(with_a_sink(PROMPTS[21][16]), PROMPTS, null_seeds=2, **NULLS)
    pd.testing.assert_frame_equal(again.frame, beside_untrained().frame, check_exact=True)
    hashes = {
        wrap(with_a_sink(PROMPTS[21][16])).weights_hash,
        *(untrained(wrap(with_a_sink(PROMPTS[21][16])), k).weights_hash for k in (0, 1)),
    }
    assert len(hashes) == 3
    kl = [set(rows.kl) for _, rows in some(beside_untrained().frame, edit="direction").groupby("model")]
    assert not (kl[0] & kl[1] or kl[1] & kl[2] or kl[0] & kl[2])
    fewer = direction_norm(with_a_sink(PROMPTS[21][16]), PROMPTS, **NULLS).frame
    pd.testing.assert_frame_equal(fewer, some(beside_untrained().frame, model="trained"), check_exact=True)


# Further than the edited token


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_horizon_covers_positions_from_the_edited_one_on(name):
    frame, one = third(tiny_model(name), horizon=3).frame, third(tiny_model(name)).frame
    own = [f"kl_at_{j}" for j in range(3)]
    assert [c for c in frame if c.startswith("kl_at")] == own
    assert not any(c.startswith("kl_at") for c in one)
    np.testing.assert_allclose(frame.kl, frame[own].astype(float).sum(axis=1), rtol=1e-6)
    there = np.array(LENGTHS)[one.target_prompt] - one.target_position >= 3
    short = one[there].reset_index(drop=True)
    keys = [*KEYS, "token", "edit", "target_prompt", "target_position"]
    pd.testing.assert_frame_equal(frame[keys], short[keys])
    assert_same_effect(tensor(frame.kl_at_0), tensor(short.kl), TOLERANCE)
    assert_same_effect(tensor(frame.kl_direct), tensor(short.kl_direct), TOLERANCE)  # nothing else was edited
    for row in frame.sample(25, random_state=0).itertuples():
        site = Site(row.layer, row.point)
        rows = vectors(tiny_model(name), PROMPTS, site)
        which = np.flatnonzero((rows.table.token == row.token) & (rows.table.edit == row.edit))[0]
        tokens = PROMPTS[row.target_prompt]
        clean, intervened = (
            forward_alone(name, tiny_model(name), tokens, site, edits)[row.target_position :][:3]
            for edits in ({}, {row.target_position: rows.vectors[which]})
        )
        exact = exact_kl(clean, intervened)
        assert_same_effect(torch.tensor([row.kl_at_0, row.kl_at_1, row.kl_at_2]), exact, TOLERANCE)
        first, second = (x.topk(2).values.diff(dim=-1).abs().min() for x in (clean, intervened))
        if min(first, second) > 2 * TOLERANCE:
            assert row.top1_changed == bool((clean.argmax(-1) != intervened.argmax(-1)).any())


@pytest.mark.parametrize("horizon", [2, 5])
def test_rows_too_near_the_end_are_dropped_and_counted(horizon):
    run, one = third(tiny_model("llama"), horizon=horizon), third(tiny_model("llama"))
    near = (np.array(LENGTHS)[one.frame.target_prompt] - one.frame.target_position < horizon).sum()
    assert near > 0
    assert run.provenance["rows_dropped"] == {f"prompt ends within the horizon of {horizon}": near}
    assert run.provenance["rows"] == len(run.frame) == len(one.frame) - near
    assert run.provenance["horizon"] == horizon


def test_metrics_of_a_horizon_are_sums_over_it():
    frame = third(tiny_model("llama"), horizon=4).frame
    recording = record(tiny_model("llama"), PROMPTS, SITES)
    for site in SITES:
        rows, found = vectors(tiny_model("llama"), PROMPTS, site), at(frame, site)
        left = (np.array(LENGTHS)[rows.table.target_prompt] - rows.table.target_position >= 4).to_numpy()
        prompt, position = (torch.tensor(rows.table[f"target_{x}"].to_numpy()[left]) for x in ("prompt", "position"))
        given = rows.vectors[torch.tensor(left)]
        effects = measure(recording, site, prompt, position, given, metrics=METRICS, horizon=4)
        for metric in ("kl", "js", "clean_entropy", "kl_direct"):
            np.testing.assert_allclose(found[metric], effects[metric].sum(1).numpy(), rtol=1e-6)
        np.testing.assert_array_equal(found.top1_changed, effects["top1_changed"].any(1).numpy())
        for j in range(4):
            np.testing.assert_array_equal(found[f"kl_at_{j}"], effects["kl"][:, j].numpy())


def test_horizon_last_measures_the_final_position():
    frame = third(tiny_model("llama"), horizon="last").frame
    assert len(frame) == len(third(tiny_model("llama")).frame)  # nothing is too near the end
    own = frame.target_position == np.array(LENGTHS)[frame.target_prompt] - 1
    assert 0 < own.sum() < len(frame) / 4
    assert (frame.kl_direct[~own] == 0).all()
    assert (frame.kl_direct[own & (frame.edit == "noise")] > 0).all()
    assert (frame.kl[~own & (frame.layer == N_LAYERS - 1)] == 0).all()  # after the last block nothing is handed on
    sample = pd.concat(
        [frame[~own & (frame.layer < 4)].sample(20, random_state=0), frame[own].sample(5, random_state=0)]
    )
    kl, exact = tensor(sample.kl), []
    for row in sample.itertuples():
        site = Site(row.layer, row.point)
        rows = vectors(tiny_model("llama"), PROMPTS, site)
        which = np.flatnonzero((rows.table.token == row.token) & (rows.table.edit == row.edit))[0]
        clean, intervened = (
            forward_alone("llama", tiny_model("llama"), PROMPTS[row.target_prompt], site, edits)[-1]
            for edits in ({}, {row.target_position: rows.vectors[which]})
        )
        exact.append(exact_kl(clean, intervened))
    assert_same_effect(kl, torch.stack(exact), TOLERANCE)


@pytest.mark.parametrize("horizon", [2, "last"])
@pytest.mark.parametrize("contexts", [("single_token",), CONTEXTS])
def test_a_single_token_has_no_later_positions(horizon, contexts):
    with pytest.raises(ResultError, match="a single token has no later positions; use context in_place"):
        third(tiny_model("llama"), horizon=horizon, contexts=contexts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sites": ()}, "no site; give at least one layer"),
        ({"sites": (Site(9),)}, "no block 9 in a model of 6 blocks"),
        ({"contexts": ("in_place", "alone")}, "no context 'alone'; known: in_place, single_token, both"),
        ({"horizon": 0}, "horizon 0; expected a number of positions, 1 or more, or 'last'"),
        ({"horizon": "end"}, "horizon 'end'"),
        ({"null_seeds": -2}, "-2 randomly initialised models; expected 0 or more"),
    ],
)
def test_invalid_settings_raise_before_anything_is_written(tmp_path, settings, message):
    with pytest.raises(MechdiagError, match=message):
        third(tiny_model("llama"), folder=tmp_path / "new", **settings)
    assert not (tmp_path / "new").exists()


# Direct effects, placebos, sinks


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma3"])
def test_direct_effect_is_total_after_the_last_block(name):
    last = N_LAYERS - 1
    sites = (Site(last, "mlp_out"), Site(last), Site(last - 1))
    frame = third(tiny_model(name), PROMPTS[:8], sites, contexts=CONTEXTS).frame
    for site in sites:
        for context in CONTEXTS:
            rows = at(frame, site, context=context)
            if site.layer == last:
                assert_same_effect(tensor(rows.kl_direct), tensor(rows.kl), TOLERANCE)
            else:
                rows = some(rows, edit="noise")  # a block that reads a LayerNorm writes the same when x is doubled
                assert ((rows.kl_direct - rows.kl).abs() > 0.01 * rows.kl).mean() > 0.9


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])  # LayerNorm and RMSNorm, all points of each
def test_a_placebo_has_the_norm_angle_and_distance_it_claims(name, monkeypatch):
    """To 1e-5 of ‖x‖ or of a radian at every site, in float64, for the vectors passed to `measure`."""
    given = {}

    def spy(recording, site, prompt, position, edited, **how):
        given[site] = (recording.at(site, prompt, position).double(), edited.double())
        return measure(recording, site, prompt, position, edited, **how)

    monkeypatch.setattr(study, "measure", spy)
    sites = [Site(layer, point) for layer in (0, N_LAYERS - 1) for point in points(name)]
    sets = ("random", "same_norm", "high_cosine")
    frame = direction_norm(tiny_model(name), PROMPTS, sites=sites, pairs=25, pair_sets=sets).frame
    for site in sites:
        rows, (x, y) = at(frame, site), given[site]
        lengths, clean = y.norm(dim=-1).numpy(), x.norm(dim=-1).numpy()
        unit, other = x / x.norm(dim=-1, keepdim=True), y / y.norm(dim=-1, keepdim=True)
        angle = (2 * torch.atan2((unit - other).norm(dim=-1), (unit + other).norm(dim=-1))).numpy()
        distance = (y - x).norm(dim=-1).numpy()
        np.testing.assert_allclose(rows.target_norm, clean, rtol=1e-5)
        np.testing.assert_allclose(rows.delta_norm, distance, rtol=0, atol=1e-5 * clean.max())
        # Beside an angle of 0 the direction of a float32 vector is known to 1e-7 of it.
        np.testing.assert_allclose(rows.delta_angle, angle, rtol=0, atol=1e-5)
        table = rows.assign(length=lengths, exact_angle=angle, distance=distance, clean=clean)
        by = table.pivot(
            index=["pair_set", "pair"], columns="edit", values=["length", "exact_angle", "distance", "clean"]
        )
        scale = by.clean.direction
        for placebo, patch in (
            ("placebo_direction", "direction"),
            ("placebo_token", "direction"),
            ("placebo_norm", "norm"),
        ):
            there = by.length[
                placebo
            ].notna()  # no rotation goes beyond 2‖x‖, and two like embeddings have no difference
            assert there.mean() > 0.9
            kept = by.length.direction if patch == "direction" else scale
            assert ((by.length[placebo] - kept).abs() <= 1e-5 * scale)[there].all(), site
            assert ((by.distance[placebo] - by.distance[patch]).abs() <= 1e-5 * scale)[there].all(), site
            if patch == "direction":
                assert ((by.exact_angle[placebo] - by.exact_angle.direction).abs() <= 1e-5)[there].all(), site
        assert (by.exact_angle.norm <= 1e-5).all(), site
        kept = by.exact_angle[["direction", "placebo_direction", "placebo_token"]].notna().all(axis=1)
        whole = np.array([pair in set(by.index[kept]) for pair in zip(rows.pair_set, rows.pair, strict=True)])
        three = [y[((rows.edit == edit) & whole).to_numpy(copy=True)] for edit in ("direction", *PLACEBOS)]
        for i, j in ((0, 1), (0, 2), (1, 2)):  # and they are three vectors
            assert ((three[i] - three[j]).norm(dim=-1) > 1e-2 * three[i].norm(dim=-1)).float().mean() > 0.95


def sink_runs(pair_set: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Filtered by `norm_of_median`, and by the run itself."""
    settings = {"layers": [0, 2, 4], "pairs": 150, "pair_sets": (pair_set,)}
    loose, strict = (
        direction_norm(with_a_sink(), PROMPTS, sink_filter=sink, **settings).frame for sink in (None, 10.0)
    )
    assert 0 < (loose.norm_of_median > 10).sum() < len(loose) / 2
    return loose[loose.norm_of_median <= 10].reset_index(drop=True), strict


def test_norm_of_median_reproduces_the_sink_filter():
    filtered, strict = sink_runs("random")
    drawn = [
        *KEYS,
        "pair",
        "edit",
        "target_prompt",
        "target_position",
        "source_prompt",
        "source_position",
        "norm_of_median",
    ]
    edits = ["direction", "norm", "full", "self"]  # tangents are drawn for all pairs at once
    filtered, strict = (x[x.edit.isin(edits)].reset_index(drop=True) for x in (filtered, strict))
    pd.testing.assert_frame_equal(filtered[drawn], strict[drawn], check_exact=True)
    assert_close(filtered, strict)


def test_norm_of_median_reproduces_the_filter_without_source():
    filtered, strict = sink_runs("scale_rotate")
    assert sorted(set(filtered.pair)) == sorted(set(strict.pair))


def test_norm_of_median_is_the_maximum_over_sites_and_tokens():
    sites = [Site(1, "attn_out"), Site(4)]
    frame = direction_norm(with_a_sink(), PROMPTS, sites=sites, pairs=60, sink_filter=None, pair_sets=("random",)).frame
    recording = record(with_a_sink(), PROMPTS, sites)
    largest = np.zeros((24, max(LENGTHS)))
    for site in sites:
        size = [x[:n].norm(dim=-1).numpy() for x, n in zip(recording.activations[site], LENGTHS, strict=True)]
        middle = np.median(np.concatenate(size))
        for row, own in zip(largest, size, strict=True):
            row[: len(own)] = np.maximum(row[: len(own)], own / middle)
    one, other = (largest[frame[f"{x}_prompt"], frame[f"{x}_position"]] for x in ("target", "source"))
    np.testing.assert_allclose(frame.norm_of_median, np.maximum(one, other), rtol=1e-5)
    assert (one > other).any() and (one < other).any()


# Models whose answers are known


def bare(vocab: int, d_model: int, n_layers: int = 3, norms: bool = False, **settings) -> nn.Module:
    """A llama whose blocks write nothing, without norms or with those that divide by the root mean square alone."""
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=d_model,
        intermediate_size=8,
        num_hidden_layers=n_layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        **settings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    for block in hf.model.layers:
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    if not norms:
        hf.model.norm = nn.Identity()
        for block in hf.model.layers:
            block.input_layernorm = block.post_attention_layernorm = nn.Identity()
    return hf


SHORT, LONG = 0.7, 2.5


def two_axes(norms: bool = False) -> nn.Module:
    """Four tokens, two lengths of two orthogonal directions; logits (s, −s, 0, 0) along one, (0, 0, s, −s) along the other."""
    hf = bare(4, 4, norms=norms, rms_norm_eps=0.0)
    axes = torch.eye(4)
    hf.model.embed_tokens.weight.copy_(torch.stack([SHORT * axes[0], LONG * axes[0], SHORT * axes[1], LONG * axes[1]]))
    hf.lm_head.weight.copy_(torch.stack([axes[0], -axes[0], axes[1], -axes[1]]))
    return hf


TOKENS = torch.randint(0, 4, (24, 20), generator=torch.Generator().manual_seed(0)).tolist()


def sizes(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lengths of B and A, and whether their directions differ."""
    tokens = np.array(TOKENS)
    b, a = (tokens[rows[f"{x}_prompt"], rows[f"{x}_position"]] for x in ("target", "source"))
    length = np.array([SHORT, LONG] * 2)
    return length[b], length[a], b // 2 != a // 2


@pytest.mark.parametrize("path", ["auto", "hooks"])
def test_patches_in_a_linear_model_have_closed_form_kl(path):
    """With Z = 2 + 2 cosh s = 4 cosh²(s/2): KL(s → t) = 2 log(cosh(t/2)/cosh(s/2)) − (t − s)·tanh(s/2) along one direction;
    at one length from one direction to the other KL = s·tanh(s/2); a full patch adds what Z grows by."""
    settings = {"layers": [0, 2], "pairs": 60, "pair_sets": ("random",), "context": "both", "path": path}
    run = direction_norm(two_axes(), TOKENS, sink_filter=None, **settings)
    by_hand = {
        "norm": lambda s, t, turned: 2 * np.log(np.cosh(t / 2) / np.cosh(s / 2)) - (t - s) * np.tanh(s / 2),
        "direction": lambda s, t, turned: np.where(turned, s * np.tanh(s / 2), 0),
        "full": lambda s, t, turned: (
            2 * np.log(np.cosh(t / 2) / np.cosh(s / 2)) + np.where(turned, s, s - t) * np.tanh(s / 2)
        ),
        "self": lambda s, t, turned: 0 * s,
    }
    for edit, kl in by_hand.items():
        rows = some(run.frame, edit=edit)
        s, t, turned = sizes(rows)
        expected = kl(s, t, turned)
        np.testing.assert_allclose(rows.kl, expected, rtol=1e-5, atol=1e-12)
        if path == "auto":
            np.testing.assert_allclose(rows.kl_direct, expected, rtol=1e-5, atol=1e-12)  # nothing else is written
        entropy = np.log(4 * np.cosh(s / 2) ** 2) - s * np.tanh(s / 2)
        np.testing.assert_allclose(rows.clean_entropy, entropy, rtol=1e-5)
        moved = {"norm": abs(t - s), "direction": np.where(turned, s * math.sqrt(2), 0)}.get(edit)
        if moved is not None:
            np.testing.assert_allclose(rows.delta_norm, moved, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(
                rows.delta_angle, np.where(turned & (edit == "direction"), math.pi / 2, 0), atol=1e-6
            )
    for g in run.select():
        s, t, turned = sizes(some(run.frame, edit="norm", layer=g["layer"], context=g["context"]))
        assert g["edits"]["direction"]["mean_kl"].value == pytest.approx(by_hand["direction"](s, t, turned).mean())
        assert g["share_direction_above_norm"].value == pytest.approx(
            (by_hand["direction"](s, t, turned) > by_hand["norm"](s, t, turned)).mean()
        )


def test_final_norm_hides_norm_patches_not_direction_patches():
    """No block writes anything, so that this holds at every depth; epsilon is 0."""
    hf = two_axes(norms=True)
    run = direction_norm(hf, TOKENS, layers=[0, 2], pairs=60, pair_sets=("random", "scale_rotate"), sink_filter=None)
    rows = run.frame[run.frame.edit.isin(["norm", "self", "scale_0.5", "scale_2", "scale_5"])]
    assert (rows.kl <= 1e-12).all() and (rows.kl_direct <= 1e-12).all()
    rows = some(run.frame, edit="direction")
    _, _, turned = sizes(rows)
    # After the norm every stream has length √4: KL of a turn is 2·tanh(1).
    np.testing.assert_allclose(rows.kl, np.where(turned, 2 * math.tanh(1), 0), rtol=1e-5, atol=1e-12)
    full = some(run.frame, edit="full")
    np.testing.assert_allclose(full.kl, np.where(turned, 2 * math.tanh(1), 0), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_after_the_last_block_a_norm_patch_is_an_exact_no_op(name):
    """RMSNorm and LayerNorm; before the last block the patch has an effect."""
    hf = fresh(name)
    for module in hf.modules():
        if "Norm" in type(module).__name__:
            setattr(module, "variance_epsilon" if hasattr(module, "variance_epsilon") else "eps", 0.0)
    run = direction_norm(hf, PROMPTS, layers=[3, N_LAYERS - 1], pairs=60, pair_sets=("random",), context="both")
    last, before = (some(run.frame, layer=layer, edit="norm") for layer in (N_LAYERS - 1, 3))
    assert (last.kl <= 1e-10).all()
    assert (last.kl_direct <= 1e-10).all()
    assert (before.kl > 1e-5).mean() > 0.9
    assert (before.kl_direct <= 1e-2 * before.kl).mean() < 1  # the direct part starts after what later blocks write
    assert (some(run.frame, layer=N_LAYERS - 1, edit="direction").kl > 1e-3).mean() > 0.9
