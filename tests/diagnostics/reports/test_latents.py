"""The page of a dictionary's latents: every row of the table, as it is, and nothing that a browser would run or load."""

import json

import numpy as np
import pandas as pd
import pytest

from diagnostics.reports import latents
from diagnostics.reports.latents import COLUMNS, EXAMPLES, VERDICTS, card_command, latents_page
from interventions.errors import ResultError
from tests.pages import read
from tests.reports import EVIL

N = 300


def table(n=N):
    r, rows = np.random.default_rng(0), np.arange(n) % 7
    frame = pd.DataFrame({c.name: r.lognormal(-5, 3, n) for c in COLUMNS if c.kind in ("number", "share")})
    frame = frame.assign(**{c.name: r.integers(0, 2000, n) for c in COLUMNS if c.kind == "count"})
    frame = frame.assign(rows=rows, prompts=rows, layer=15, point="resid_post", short=rows < 5)
    frame = frame.assign(sae=np.repeat(["15/standard", EVIL], n // 2), latent=np.tile(np.arange(n // 2), 2))
    words = [f"</script> & {i}  <b>x</b>  \u2028 東京" for i in range(n)]
    frame = frame.assign(verdict=np.resize([*VERDICTS, EVIL], n), promoted=words, suppressed="")
    frame.loc[rows == 0, ["kl", "kl_placebo"]] = np.nan
    frame.loc[frame.index == 3, "over_placebo_high"] = np.inf
    return frame


def stored(folder, frame=None):
    frame = table() if frame is None else frame
    folder.mkdir(exist_ok=True)
    frame.to_parquet(folder / "latents.parquet")
    k = np.repeat(np.arange(len(frame)), frame["rows"])
    rows = frame.loc[k, ["sae", "latent"]].assign(kl=np.arange(len(k)) / 10, z=1.0, prompt=k, position=2)
    rows.sample(frac=1, random_state=0).to_parquet(folder / "rows", partition_cols=["sae"])
    return folder


def data(page):
    inside = page.split('id="data">')[1].split("</script>")[0]
    assert "<" not in inside and "&" not in inside and "\u202e" not in inside
    return json.loads(inside)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return latents_page(stored(tmp_path_factory.mktemp("run")))[0]


def test_page_is_self_contained_and_runs_no_token(page):
    found = read(page)
    assert found.tags.count("script") == 2 and found.of("script", "src") == [None, None]
    assert found.loads == [] and "@import" not in page and "url(" not in page and "innerHTML" not in page
    assert EVIL in "".join(found.text)  # the SAE's name, escaped once
    assert found.tags.count("tr") == 1  # rows are made as they come into view


def test_page_data_has_every_latents_numbers(page):
    frame, found = table(), data(page)
    columns = {c["name"]: c for c in found["columns"]}
    assert found["n"] == N and list(columns) == [c.name for c in COLUMNS]
    assert all(len(c["values"]) == N for c in columns.values())
    for name in ("frequency", "kl", "over_placebo_high", "rows", "latent"):
        values = [np.nan if v is None else float(v) for v in columns[name]["values"]]
        np.testing.assert_allclose(values, frame[name], rtol=1e-3)
    assert columns["kl"]["values"][0] is None and columns["over_placebo_high"]["values"][3] == "Infinity"
    named = [columns["sae"]["levels"][code] for code in columns["sae"]["values"]]
    assert named[0] == "15/standard" and "bidi" in named[-1] and len(set(named)) == 2
    assert columns["promoted"]["values"][7] == "</script> & 7  <b>x</b>  \\u2028 東京"


def test_columns_of_a_single_value_and_few_rows(tmp_path):
    found = data(latents_page(stored(tmp_path, table(2)[:1].assign(rows=1)))[0])
    columns = {c["name"]: c for c in found["columns"]}
    assert (
        not columns["sae"]["main"] and columns["sae"]["levels"] == ["15/standard"] and len(found["examples"]["of"]) == 1
    )


def test_examples_are_the_strongest_rows_of_each_latent(page):
    found = data(page)["examples"]
    rows = table()["rows"]
    last = np.cumsum(rows)  # KL rises within a latent
    expected = [(of, (last[of] - 1 - n) / 10) for of in range(N) for n in range(min(EXAMPLES, rows[of]))]
    assert [(of, pytest.approx(kl, rel=1e-3)) for of, kl in zip(found["of"], found["kl"], strict=True)] == expected
    assert found["prompt"] == found["of"] and "kl_placebo" not in found


def test_names_that_look_like_numbers_keep_their_examples(tmp_path):
    frame = table(20).assign(sae=np.repeat(["007", "8"], 10))
    assert len(set(data(latents_page(stored(tmp_path, frame))[0])["examples"]["of"])) == (frame["rows"] > 0).sum()


def test_examples_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "MOST_EXAMPLES", N - 1)
    page = latents_page(stored(tmp_path))[0]
    assert len(data(page)["examples"]["of"]) == (table()["rows"] > 0).sum() and "the 1 row of" in page
    monkeypatch.setattr(latents, "MOST_EXAMPLES", 9)
    page = latents_page(tmp_path)[0]
    assert data(page)["examples"] == {} and "Cards show no rows" in page


def test_card_command_names_the_runs_sae_and_text():
    run = {
        "model": "smollm2-135m",
        "command": [
            "atlas.py",
            "--all-latents",
            "--saes",
            "standard",
            "my/cosine",
            "--layers",
            "7",
            "15",
            "--prompts",
            "sotu",
        ],
    }
    said = card_command("15/standard", 15, run)
    assert said.startswith("mechdiag latent-card --saes smollm2-135m/15/standard --model smollm2-135m --prompts sotu")
    assert said.endswith(" --latents {latent} --out cards") and "--saes my/cosine " in card_command("cosine", 15, run)
    assert "--saes 'a b' --latents" in card_command("a b", 3, {})
    assert "--n-prompts" not in card_command("a", 3, {"command": ["atlas.py", "--n-prompts", "0"]})
    assert "--n-prompts 9 " in card_command("a", 3, {"command": ["atlas.py", "--n-prompts", "9"]})


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (None, "no latents.parquet in .*; expected the folder of mechdiag atlas --all-latents"),
        (table().drop(columns=["kl", "q"]), "has no column kl, q; expected the table of"),
        (table()[:0], "has no row; expected one for each latent"),
        ("damaged", "latents.parquet is damaged: "),
    ],
)
def test_invalid_tables_raise(tmp_path, frame, message):
    if isinstance(frame, str):
        (tmp_path / "latents.parquet").write_text(frame)
    elif frame is not None:
        frame.to_parquet(tmp_path / "latents.parquet")
    with pytest.raises(ResultError, match=message):
        latents_page(tmp_path)
