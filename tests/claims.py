"""Claims of docs/findings.md and docs/results, each with its numbers from a committed result: `python -m tests.claims` writes docs/claims.md.

`docs/claims.yaml` lists the claims; `docs/results/data/` holds the summaries that their numbers come from, and how each was made.
`python -m tests.claims keep FOLDER NAME` puts the summary of a result there (`NAME --part matched`: another of its tables; several folders: their tables together). `tests/test_claims.py` checks that the page is that of
the list, and that every sentence quoted stands in its page with the numbers of the data.

A number `{table: dose, where: {layer: 22, edit: norm_up}, column: ÷ isotropic}` is one cell; with `interval: true` its ends
`x_low`, `x_high` follow in brackets; `format` is that of Python, `.3g` unless given; `over: min` or `max` takes the least or largest
of several lines; `null: true` in `where` takes the randomly initialised models. `.2fs`: without the 0 before the point.
"""

import argparse
import json
import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from diagnostics.pairs.shares import standing_out
from diagnostics.sae_evaluation.matched import of_differences
from diagnostics.saved import saved_results
from diagnostics.statistics.estimate import CensoredMedian, Estimate, FiellerInterval
from diagnostics.statistics.tables import with_ends
from interventions.files import jsonable

DOCS = Path(__file__).parents[1] / "docs"
DATA = DOCS / "results" / "data"
PLURAL = {
    "holds": "hold",
    "holds under conditions": "hold under conditions",
    "not resolved": "are not resolved",
    "does not hold": "do not hold",
}
VERDICTS = tuple(PLURAL)
NOT_KEPT = "an earlier run, not kept"


def part_of(result: Any, part: str, l0: Sequence[float] = ()) -> pd.DataFrame:
    """A table of a result: its summary, an attribute that lists groups, or an entry of its JSON's summary; estimates as columns.

    l0: of `matched`, where families are compared.
    """
    if not part:
        return result.summary()
    if part == "draws":  # of an atlas
        lines = [
            {"sae": g["sae"], "layer": g["layer"], "draws": n} | d for g in result.groups for n, d in g["draws"].items()
        ]
    elif part == "tails":  # of an atlas
        lines = [_tails(sae, layer, rows) for (sae, layer), rows in result.to_frame().groupby(["sae", "layer"])]
    elif part == "paired":  # of an evaluation: each cosine SAE less the standard one of its block
        whole = {(g["sae"], g["corpus"]): g for g in result.groups if g["quartile"] == "all" and g["tokens"] != "all"}
        lines = [_paired(sae, corpus, whole, result.deletions) for sae, corpus in whole if sae.endswith("/cosine")]
    elif part in ("strongest", "audit"):  # of activation patching
        return getattr(result, part)()
    elif part == "edges":  # those that beat their controls
        return standing_out(result.edges)
    elif part == "edge_counts":
        own = result.edges.groupby("direction")
        return own.agg(edges=("beats", "size"), beat_control=("beats", "sum"), null=("null", "first")).reset_index()
    elif part == "matched" and l0:
        lines = [m for q in l0 for m in result.matched_at(l0=q) if m["axis"] == "l0"]
    elif part in ("groups", "matched", "shift", "alignments"):
        lines = getattr(result, part)
    else:
        lines = result.as_dict()["summary"][part]
        lines = [
            {k: Estimate(**v) if isinstance(v, dict) and "value" in v else v for k, v in line.items()} for line in lines
        ]
    plain = (str, int, float, bool, np.generic, Estimate, FiellerInterval, CensoredMedian)
    return pd.DataFrame([with_ends({k: v for k, v in line.items() if isinstance(v, plain)}) for line in lines])


def _tails(sae: str, layer: int, rows: pd.DataFrame) -> dict[str, Any]:
    """How much of summed KL is second order, and the ratio of means without the largest effects, of an SAE in an atlas."""
    scored, beside = rows.dropna(subset="second_order"), rows.dropna(subset="kl_placebo")
    large, typical = scored["kl"] > 0.1, (scored["second_order"] / scored["kl"]).between(1 / 1.25, 1.25)
    drop = scored["top1_drop"] / scored["gradient"]
    usual = beside[beside[["kl", "kl_placebo"]].max(axis=1) < rows["kl"].quantile(0.99)]
    return {
        "sae": sae,
        "layer": layer,
        "scored_rows": len(scored),
        "second_order_of_kl": scored["second_order"].sum() / scored["kl"].sum(),
        "median_kl_over_second_order": (scored["kl"] / scored["second_order"]).median(),
        "within_a_quarter": typical.mean(),
        "kl_above_.1": scored["kl"][large].sum() / scored["kl"].sum(),
        "median_kl_over_second_order_above_.1": (scored["kl"] / scored["second_order"])[large].median(),
        "median_drop_over_gradient": drop.median(),
        "drop_within_a_quarter": drop.between(1 / 1.25, 1.25).mean(),
        "mean_kl_over_placebo": beside["kl"].sum() / beside["kl_placebo"].sum(),
        "mean_kl_over_placebo_below_largest_hundredth": usual["kl"].sum() / usual["kl_placebo"].sum(),
    }


def _paired(sae: str, corpus: str, whole: dict[tuple[str, str], Any], deletions: pd.DataFrame) -> dict[str, Any]:
    """An SAE less the standard one of its block, paired over prompts."""
    line: dict[str, Any] = {"sae": sae, "corpus": corpus}
    pair = (sae, sae.replace("cosine", "standard"))
    some = [deletions.loc[(deletions["sae"] == name) & (deletions["corpus"] == corpus)] for name in pair]
    for m, n in (("fve", "n_prompts"), ("kl_score", "n_kl_prompts")):
        first = whole[pair[0], corpus][m].value - whole[pair[1], corpus][m].value
        moved = some[0][m].to_numpy() - some[1][m].to_numpy()
        n_prompts = whole[sae, corpus][n]
        sizes = some[0]["n_tokens"].to_numpy()[:n_prompts]
        line[m] = of_differences(np.r_[first, moved[:n_prompts]], n_prompts, sizes)
    return line


def keep(folders: list[Path], name: str, part: str = "", l0: Sequence[float] = ()) -> None:
    """A table of the one result in each folder, one below the other, and how the first was made, into `DATA`."""
    results = [result for folder in folders for result in saved_results(folder).values()]
    assert len(results) == len(folders), f"{len(results)} results in {len(folders)} folders; expected one in each"
    DATA.mkdir(exist_ok=True)
    pd.concat([part_of(result, part, l0) for result in results]).to_csv(
        DATA / f"{name}.csv", index=False, float_format="%.6g"
    )
    result, p = results[0], results[0].provenance
    kept = (
        "command",
        "call",
        "planted",
        "model",
        "weights_sha256",
        "text",
        "prompts",
        "dtype",
        "device",
        "seed",
        "versions",
        "path",
    )
    made = {"kind": type(result).NAME} | {key: p[key] for key in kept if key in p}
    if "command" in made:  # files of this machine by their name
        made["command"] = shlex.join(f"results/{Path(a).name}" if a.startswith("/") else a for a in made["command"])
    (DATA / f"{name}.json").write_text(json.dumps(jsonable(made), indent=1, ensure_ascii=False) + "\n")


@cache
def table(name: str) -> pd.DataFrame:
    found = pd.read_csv(DATA / f"{name}.csv")
    words = found.select_dtypes(["object", "string"]).columns
    found = found.fillna(dict.fromkeys(words, "")).copy()
    return found.assign(null=found["model"].str.startswith("random")) if "model" in found else found


def made(name: str) -> dict[str, Any]:
    return json.loads((DATA / f"{name}.json").read_text())


def _how(run: dict[str, Any]) -> str:
    """The command or the call that made a result."""
    if "command" in run:
        return str(run["command"])
    call = run["call"]
    given = [f"{name}={value!r}" for name, value in call["arguments"].items()]
    return f"{call['function']}({', '.join(given + [f'{name}=…' for name in call.get('not_kept', [])])})"


def number(spec: dict[str, Any]) -> str:
    """A cell of a table as it is quoted, its interval in brackets."""
    some = table(spec["table"])
    for column, value in spec.get("where", {}).items():
        near = np.isclose(some[column], value) if isinstance(value, float) else some[column] == value
        some = some[near]
    if spec.get("over"):
        row = some.loc[getattr(some[spec["column"]], f"idx{spec['over']}")()]
    else:
        if len(some) != 1:
            raise ValueError(f"{len(some)} lines of {spec['table']} meet {spec.get('where')}; expected one")
        row = some.iloc[0]
    names = [spec["column"], *(f"{spec['column']}_{end}" for end in ("low", "high") if spec.get("interval"))]
    shown = [_shown(float(row[name]) * spec.get("times", 1), str(spec.get("format", ".3g"))) for name in names]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]" if spec.get("interval") else shown[0]


def _shown(value: float, how: str) -> str:
    """A number by a format of Python; with an s at its end without the 0 before the point, as in −.41."""
    text = format(value, how.removesuffix("s"))
    if "e+" in text:
        text = f"{float(text):,.0f}"
    text = text.replace("-", "−")
    return text.replace("0.", ".", 1) if how.endswith("s") and text.lstrip("−").startswith("0.") else text


def claims() -> list[dict[str, Any]]:
    """The list, each claim with its numbers filled in."""
    found = yaml.safe_load((DOCS / "claims.yaml").read_text())
    for claim in found:
        values = {name: number(spec) for name, spec in claim.get("numbers", {}).items()}
        for key in ("estimate", "control"):
            claim[key] = str(claim.get(key, "")).format(**values)
        claim["quoted"] = [
            {"page": page, "text": text.format(**values)}
            for page, texts in claim.get("quoted", {}).items()
            for text in ([texts] if isinstance(texts, str) else texts)
        ]
        claim["tables"] = sorted({spec["table"] for spec in claim.get("numbers", {}).values()})
    return found


def page() -> str:
    """The page of all claims."""
    every = claims()
    counts = ", ".join(f"{sum(c['verdict'] == v for c in every)} {PLURAL[v]}" for v in VERDICTS)
    lines = [
        "# Claims",
        "",
        "*Every finding that [What came out](findings.md) and [results](results/direction_norm.md) state, with its control and its verdict.*",
        "",
        "Estimates have 95 % intervals over prompts in brackets ([statistics](statistics.md)). *Holds*: the interval is clear of the "
        "control. *Holds under conditions*: it depends on a choice that the claim names. *Not resolved*: the interval holds both the "
        "control and values that would matter; the absence of a significant difference is not called equivalence "
        "(equivalent: within 0.8 to 1.25 times). *Does not hold*: the control shows it too, or the interval excludes it. "
        "All but those on planted data are of SmolLM2-135M, with SAEs trained on a million tokens.",
        "",
        f"{len(every)} claims: {counts}.",
        "",
    ]
    for section in dict.fromkeys(c["section"] for c in every):
        lines += [f"## {section}", "", "| claim | estimate | control | verdict | from |", "|---|---|---|---|---|"]
        for c in every:
            if c["section"] == section:
                source = ", ".join(f"[{t}](results/data/{t}.csv)" for t in c["tables"]) or c.get("source", NOT_KEPT)
                cells = [c["claim"], c["estimate"], c["control"], f"**{c['verdict']}**", source]
                lines.append(
                    "| " + " | ".join(str(cell).strip().replace("\n", " ").replace("|", "\\|") for cell in cells) + " |"
                )
        lines.append("")
    lines += ["## Runs", ""]
    runs: dict[str, list[str]] = {}
    for name in sorted({t for c in every for t in c["tables"]}):
        runs.setdefault(_how(made(name)), []).append(f"`{name}`")
    lines += [f"- {', '.join(names)}: `{how}`" for how, names in runs.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("keep", nargs="*", help="keep FOLDER… NAME")
    parser.add_argument(
        "--part", default="", help="`groups`, `matched`, `shift`, `draws`, `tails`, `paired` … in place of the summary"
    )
    parser.add_argument(
        "--l0", nargs="+", type=float, default=(), help="with --part matched: compare at each of these L0"
    )
    args = parser.parse_args()
    if args.keep:
        word, *folders, name = args.keep
        assert word == "keep", f"{word!r}; expected keep FOLDER… NAME"
        keep([Path(folder) for folder in folders], name, args.part, args.l0)
    else:
        (DOCS / "claims.md").write_text(page())


if __name__ == "__main__":
    main()
