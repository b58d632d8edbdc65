"""Results as one page: headlines, figures, tables, caveats, and how to reproduce them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from diagnostics.results.calls import reproduction
from diagnostics.results.caveats import caveats, differences
from diagnostics.results.html_tables import table_html
from diagnostics.results.page import measured, pictures, quiet, titled
from diagnostics.results.result import BaseResult
from diagnostics.results.templates import render
from diagnostics.results.words import listed, measured_on, provenances, text_names
from interventions.errors import ResultError
from interventions.files import jsonable

FIRST_LINES = 12
"""Rows of a long table that show before a click."""
FIRST_NUMBERS = 8
"""Headlines of one result on the first screen; further ones are counted."""


_MACHINE = {"device": "", "threads": " threads"}


def report(
    results: Mapping[str, BaseResult],
    *,
    title: str = "Results",
    unfinished: Sequence[str] = (),
    damaged: Mapping[str, str] | None = None,
    code: Mapping[str, str] | None = None,
) -> str:
    """Results by name as one HTML page without external resources. The same results give the same bytes.

    unfinished: runs without a result yet; damaged: results that cannot be loaded, with the reason; code: version of the code that made
    each result, where it is known. The page lists all three. Raises `ResultError` for no results.
    """
    if not results:
        raise ResultError("no result to report; give at least one")
    code = code or {}
    sections = [_section(name, result, f"r{n}", code.get(name)) for n, (name, result) in enumerate(results.items(), 1)]
    return render(
        "reports/report.html",
        title=title,
        lead=_lead(results),
        sections=sections,
        unlike=_unlike(differences(results), unfinished, damaged or {}, code),
        first_numbers=FIRST_NUMBERS,
        first_lines=FIRST_LINES,
    )


def _lead(results: Mapping[str, BaseResult]) -> str:
    every = [p for result in results.values() for p in provenances(result).values()]
    models = dict.fromkeys(measured_on(p)[0] for p in every if "model" in p)
    texts = dict.fromkeys(name for p in every for name in text_names(p))
    kinds = dict.fromkeys(_within_a_sentence(titled(result)) for result in results.values())
    n = f"{len(results)} result{'s' * (len(results) > 1)}"
    return f"{n} ({listed(kinds)}) on {listed(models)}; text: {listed(texts)}."


def _within_a_sentence(title: str) -> str:
    return title if title[1:2].isupper() else title[:1].lower() + title[1:]


def _unlike(
    unlike: Sequence[str], unfinished: Sequence[str], damaged: Mapping[str, str], code: Mapping[str, str]
) -> list[str]:
    """Differences between results, and what is left out."""
    lines = [*unlike, *(f"unfinished run, left out: {name}" for name in unfinished)]
    lines += [f"damaged result, left out: {name}: {why}" for name, why in damaged.items()]
    by: dict[str, list[str]] = {}
    for name, version in code.items():
        by.setdefault(version, []).append(name)
    if len(by) > 1:
        said = "; ".join(f"{version} in {listed(names, 4)}" for version, names in by.items())
        lines.append(f"code of the package differs: {said}")
    return lines


def _section(name: str, result: BaseResult, anchor: str, code: str | None) -> dict[str, Any]:
    known = caveats(result)  # first: it collects warnings of statistics that are computed once
    with quiet():
        first, tables = list(result.headlines()), result.tables()
    figures, no_figure = pictures(result.figures)
    return {
        "name": name,
        "anchor": anchor,
        "title": titled(result),
        "question": result.QUESTION,
        "headlines": first,
        "runs": measured(result),
        "known": known,
        "figures": figures,
        "no_figure": no_figure,
        "tables": [
            (title, table_html(frame, title, most=FIRST_LINES, sortable=True), len(frame))
            for title, frame in tables.items()
        ],
        "note": result.NOTE,
        "steps": reproduction(result, name),
        "facts": _facts(result, code),
        "provenance": json.dumps(jsonable(result.provenance), indent=1, ensure_ascii=False),
    }


def _facts(result: BaseResult, code: str | None) -> list[tuple[str, str]]:
    """Weights, text, SAEs, versions and machine of each run, where they are known."""
    facts = []
    for run, p in provenances(result).items():
        versions = ", ".join(f"{package} {v}" for package, v in p.get("versions", {}).items() if v)
        known = {
            "weights": f"sha256 {p['weights_sha256']}" if "weights_sha256" in p else "",
            "text": _texts(p),
            "SAEs": "; ".join(f"{sae} {s['sha256']}" for sae, s in p.get("saes", {}).items() if "sha256" in s),
            "versions": ", ".join(filter(None, [f"Python {p['python']}" if "python" in p else "", versions])),
            "machine": ", ".join([str(p[what]) + unit for what, unit in _MACHINE.items() if what in p]),
        }
        facts += [(f"{run}: {what}" if run else what, said) for what, said in known.items() if said]
    return facts + ([("code", code)] if code else [])


def _texts(p: Mapping[str, object]) -> str:
    one, several = p.get("text"), p.get("texts")
    named = {"": one} if isinstance(one, Mapping) else several if isinstance(several, Mapping) else {}
    parts = []
    for name, text in named.items():
        if isinstance(text, Mapping):
            said = [
                str(text.get("name", name)),
                f"sha256 {text['sha256']}" if "sha256" in text else "",
                str(text.get("licence", "")),
            ]
            parts.append(", ".join(part for part in said if part))
    return "; ".join(parts)
