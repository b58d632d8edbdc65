"""The latents of whole dictionaries on one page: sorted, filtered, and a card of each."""

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from jinja2.utils import htmlsafe_json_dumps
from pyarrow.dataset import partitioning

from diagnostics.commands.command import printable
from diagnostics.commands.sae_inputs import sae_paths
from diagnostics.results.templates import render
from diagnostics.results.words import listed, measured_on
from interventions.errors import ResultError
from interventions.files import read_json

TABLE, ROWS = "latents.parquet", "rows"
"""The table of latents, and the data set of its rows, in the folder of a run."""
EXAMPLES = 3
"""Rows of largest KL that a card shows."""
MOST_EXAMPLES = 60_000
"""Example rows on a page, about 3 MB; of more latents fewer rows each, or none."""
DIGITS = 4
"""Significant digits of numbers on the page."""


class Column(NamedTuple):
    """A column of the page."""

    name: str
    """in the table"""
    label: str
    kind: str
    """`count`, `number`, `share`, `yes`, `name` or `tokens`"""
    meaning: str
    main: bool = True
    """whether it shows without a click"""


COLUMNS = (
    Column("latent", "latent", "count", "index in the SAE"),
    Column("sae", "SAE", "name", "name of the SAE"),
    Column("kl", "KL", "number", "median KL(clean ‖ ablated) of the next-token distribution, nats"),
    Column("kl_placebo", "placebo KL", "number", "the same of matched controls (placebos): same ‖Δx‖ and angle to x"),
    Column("over_placebo", "÷ placebo", "number", "median ratio of KL to its placebo's KL"),
    Column("over_placebo_low", "÷ low", "number", "lower end of its 95 % interval, prompts as clusters"),
    Column("verdict", "verdict", "name", "whether removing the latent does more than a placebo"),
    Column("q", "q", "number", "p after Benjamini–Hochberg over the SAE's tested latents"),
    Column("frequency", "fires on", "share", "share of the usable tokens at which it is active"),
    Column("rows", "rows", "count", "tokens at which it was removed"),
    Column("top1_changed", "top-1", "share", "share of its rows whose most likely token changes"),
    Column("dose", "dose", "number", "median ‖z·d‖/‖x‖"),
    Column("promoted", "promoted", "tokens", "tokens that the ablation raises most on average"),
    Column("suppressed", "suppressed", "tokens", "tokens that the ablation lowers most on average"),
    Column("over_placebo_high", "÷ high", "number", "upper end of the interval of KL ÷ placebo", False),
    Column("kl_low", "KL low", "number", "lower end of the 95 % interval of the median KL, by prompt, nats", False),
    Column("kl_high", "KL high", "number", "upper end of it, nats", False),
    Column(
        "kl_direct", "direct KL", "number", "median KL of the change carried straight to the unembedding, nats", False
    ),
    Column("p", "p", "number", "test of KL above its placebo's", False),
    Column("firings", "firings", "count", "usable tokens at which it is active", False),
    Column("prompts", "prompts", "count", "distinct prompts among its rows", False),
    Column("short", "short", "yes", "fewer rows than asked for", False),
    Column("median_z", "median z", "number", "median activation", False),
    Column("max_z", "largest z", "number", "activation of largest |z|, signed", False),
    Column("layer", "layer", "count", "block, 0-based", False),
    Column("point", "point", "name", "where in the block", False),
)
VERDICTS = {
    "more than dose": "Removing it changes the output more than a placebo of the same norm and angle.",
    "no more than dose": "Removing it is not shown to change the output more than a placebo of the same norm and angle.",
    "small": "Removing it changes the output by less than .001 nats.",
    "silent": "The effect of removing it lies within ten noise floors.",
    "too few prompts": "It was measured in too few prompts for a verdict.",
    "never active": "It is active at no usable token of this text.",
}
"""Verdicts and their meanings, in the order of the page."""
_EXAMPLE = ("prompt", "position", "z", "kl", "kl_direct", "kl_placebo")
_CARRIED = ("--model", "--dtype", "--prompts", "--n-prompts", "--held-out", "--max-length", "--seed")
"""Options of the run that a card of its latents takes too."""


def latents_page(folder: str | Path, *, title: str = "Latents") -> tuple[str, int]:
    """The table of latents in a folder as one HTML page without external resources, and its number of latents.

    Numbers have four digits. A card of each latent shows up to three of its rows; pages of more than 60,000 rows show fewer.
    Raises `ResultError` for a folder without `latents.parquet`, and for a table that is damaged, empty or lacks columns.
    """
    folder = Path(folder)
    frame = _table(folder).astype({"sae": str})
    documents = [read_json(path) for path in sorted(folder.glob("*.json"))]
    found = [d["provenance"] for d in documents if isinstance(d, dict) and isinstance(d.get("provenance"), dict)]
    provenance = found[0] if found else {}
    examples, each = _examples(folder, frame)
    columns = [c._replace(main=c.main and (c.name != "sae" or frame.sae.nunique() > 1))._asdict() for c in COLUMNS]
    data = {
        "n": len(frame),
        "columns": [column | _packed(frame[column["name"]], column["kind"]) for column in columns],
        "verdicts": VERDICTS,
        "examples": examples,
        "commands": {
            printable(sae): printable(card_command(sae, int(some.layer.iloc[0]), provenance))
            for sae, some in frame.groupby("sae")
        },
    }
    verdicts = frame.verdict.value_counts()
    page = render(
        "reports/latents.html",
        title=title,
        n=len(frame),
        saes={printable(name): int(n) for name, n in frame.sae.value_counts(sort=False).items()},
        runs=" · ".join(measured_on(provenance)) if "model" in provenance else "",
        columns=columns,
        verdicts={name: int(verdicts[name]) for name in [*VERDICTS, *verdicts.index] if name in verdicts.index},
        examples=each,
        data=htmlsafe_json_dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False),
    )
    return page, len(frame)


def card_command(sae: str, layer: int, provenance: Mapping[str, Any]) -> str:
    """The command that writes the card of a latent of an SAE, but for the latent's number: `{latent}` stands for it."""
    words = [str(word) for word in provenance.get("command", ())]
    model = str(provenance.get("model", ""))
    given = _values(words, "--saes")
    paths = sae_paths(given, [int(n) for n in _values(words, "--layers") if n.isdigit()] or [layer], model)
    path = next((path for path in paths if f"/{path}".endswith(f"/{sae}")), sae)
    carried = {option: value for option in _CARRIED for value in _values(words, option)[:1]}
    if carried.get("--n-prompts") == "0":  # as many as hold --scan-tokens, which cards do not know
        del carried["--n-prompts"]
    more = [word for pair in carried.items() for word in pair]
    if model and "--model" not in more:
        more = ["--model", model, *more]
    return (
        f"mechdiag latent-card --saes {shlex.quote(path)} {shlex.join(more)}".rstrip()
        + " --latents {latent} --out cards"
    )


def _values(words: Sequence[str], option: str) -> list[str]:
    """What follows an option of a command line, up to the next option."""
    if option not in words:
        return []
    after = words[words.index(option) + 1 :]
    n = next((n for n, word in enumerate(after) if word.startswith("--")), len(after))
    return list(after[:n])


def _table(folder: Path) -> pd.DataFrame:
    """The table of latents."""
    path = folder / TABLE
    if not os.path.isfile(path):
        raise ResultError(f"no {TABLE} in {folder}; expected the folder of mechdiag atlas --all-latents")
    frame = _read(path)
    if missing := [c.name for c in COLUMNS if c.name not in frame.columns]:
        raise ResultError(f"{path} has no column {listed(missing)}; expected the table of mechdiag atlas --all-latents")
    if frame.empty:
        raise ResultError(f"{path} has no row; expected one for each latent")
    return frame


def _read(path: Path, **how: Any) -> pd.DataFrame:
    try:
        return pd.read_parquet(path, **how)
    except (OSError, ValueError, KeyError) as error:  # pyarrow's errors are of these
        raise ResultError(f"{path} is damaged: {str(error).splitlines()[0]}") from error


def _packed(values: pd.Series, kind: str = "number") -> dict[str, Any]:
    """A column as JSON: numbers with four digits, names as codes, control characters escaped."""
    if pd.api.types.is_bool_dtype(values) or pd.api.types.is_integer_dtype(values):
        return {"values": values.astype(int).tolist()}
    if pd.api.types.is_float_dtype(values):
        return {"values": _rounded(values)}
    codes, levels = pd.factorize(values.fillna("").astype(str).map(printable))
    if kind != "name" and 4 * len(levels) > len(values):
        return {"values": [str(levels[code]) for code in codes]}
    return {"levels": [str(level) for level in levels], "values": codes.tolist()}


def _rounded(values: pd.Series) -> list[float | str | None]:
    """Numbers with four digits; None for nan; infinities, which JSON lacks, as text."""
    plain = [float(f"{x:.{DIGITS}g}") for x in values.to_numpy(dtype=float)]
    small = [int(x) if x == x and abs(x) < 1e9 and x == int(x) else x for x in plain]
    return [None if x != x else x if abs(x) < np.inf else f"{'-' * (x < 0)}Infinity" for x in small]


def _examples(folder: Path, frame: pd.DataFrame) -> tuple[dict[str, list[Any]], int]:
    """The rows of largest KL of each latent, by column, `of` the latent's place in the table; and how many a latent has at most."""
    each = min(EXAMPLES, MOST_EXAMPLES // int((frame["rows"] > 0).sum() or 1))
    if not os.path.isdir(folder / ROWS) or not each:
        return {}, 0
    keys = ["sae", "latent"]
    rows = _read(folder / ROWS, partitioning=partitioning(pa.schema([("sae", pa.string())]), flavor="hive"))
    if missing := [name for name in (*keys, "kl") if name not in rows.columns]:
        raise ResultError(f"{folder / ROWS} has no column {listed(missing)}; expected the rows of {TABLE}")
    columns = [name for name in _EXAMPLE if name in rows.columns]
    rows = rows[[*keys, *columns]].astype({"sae": str}).sort_values("kl", ascending=False, kind="stable")
    rows = rows.groupby(keys, sort=False).head(each)
    place = frame[keys].assign(of=range(len(frame)))
    rows = rows.merge(place, on=keys, validate="many_to_one").sort_values("of", kind="stable")
    return {name: _packed(rows[name])["values"] for name in ["of", *columns]}, each
