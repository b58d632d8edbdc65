"""Results as one page: what was measured, the numbers to look at first, every figure and table, and how to make them again."""

import json
from collections.abc import Mapping, Sequence
from html import escape

import pandas as pd

from diagnostics.caveats import caveats, differences
from diagnostics.html_figures import picture
from diagnostics.html_tables import table_html
from diagnostics.report_style import REPORT_STYLE, SCRIPT
from diagnostics.reproduction import reproduction
from diagnostics.result_html import measured, note, quiet, titled, to_know
from diagnostics.results import BaseResult, jsonable
from diagnostics.settings_words import listed, measured_on, provenances, text_names
from interventions.errors import MechdiagError, ResultError

FIRST_LINES = 12
"""Of a long table; the rest shows on a click."""
FIRST_NUMBERS = 8
"""Of one result, on the first screen; how many more there are is said."""


def report(
    results: Mapping[str, BaseResult],
    *,
    title: str = "Results",
    unfinished: Sequence[str] = (),
    damaged: Mapping[str, str] | None = None,
    code: Mapping[str, str] | None = None,
) -> str:
    """Results by name as one HTML page that needs nothing else: no network, no other file, the same bytes for the same results.

    unfinished: runs that were begun and have no result; damaged: results that cannot be loaded, with the reason; code: version of the
    code that made each result, where it is known. All are told. Everything that comes from data is escaped. Raises `ResultError` for no results.
    """
    if not results:
        raise ResultError("no result to report; give at least one")
    names = list(results)
    anchors = {name: f"r{n}" for n, name in enumerate(names, 1)}
    known = {name: caveats(result) for name, result in results.items()}
    body = [
        f"<header><h1>{escape(title)}</h1>{_lead(results)}</header>",
        _first(results, anchors),
        _contents(results, anchors, known),
        _shared(differences(results), unfinished, damaged or {}, code or {}),
        *(
            _section(name, result, anchors[name], known[name], (code or {}).get(name))
            for name, result in results.items()
        ),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{REPORT_STYLE}</style></head>\n"
        f'<body><main class="mdc report">{chr(10).join(body)}</main><script>{SCRIPT}</script></body></html>\n'
    )


def _lead(results: Mapping[str, BaseResult]) -> str:
    every = [p for result in results.values() for p in provenances(result).values()]
    models = dict.fromkeys(measured_on(p)[0] for p in every if "model" in p)
    texts = dict.fromkeys(name for p in every for name in text_names(p))
    kinds = dict.fromkeys(_within_a_sentence(titled(result)) for result in results.values())
    said = (
        f"{len(results)} result{'s' * (len(results) > 1)} ({listed(kinds)}) on {listed(models)}; text: {listed(texts)}."
    )
    return f'<p class="lead">{escape(said)}</p>'


def _within_a_sentence(title: str) -> str:
    return title if title[1:2].isupper() else title[:1].lower() + title[1:]


def _first(results: Mapping[str, BaseResult], anchors: Mapping[str, str]) -> str:
    rows = []
    for name, result in results.items():
        with quiet():
            found = list(result.headlines())
        link = f'<a href="#{anchors[name]}">{escape(name)}</a>'
        rows += [
            f"<tr><td class=words>{escape(h.what)} <span class=ci>({link})</span></td>"
            f'<td class="words value"><b>{escape(h.value)}</b></td><td class="words ci">{escape(h.against)}</td></tr>'
            for h in found[:FIRST_NUMBERS]
        ]
        if more := len(found[FIRST_NUMBERS:]):
            rows.append(
                f"<tr><td class=words colspan=3>and {more} more such number{'s' * (more > 1)} in {link}</td></tr>"
            )
    if not rows:
        return ""
    head = "<tr><th scope=col class=words>what</th><th scope=col class=words>value</th><th scope=col class=words>compare with</th></tr>"
    words = "Brackets: 95 % intervals; how each is formed stands with its result. More numbers, and the figures, follow below."
    return (
        f'<h2 id="first">First numbers</h2><div class="scroll heads"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'
        f"<p class=soft>{words}</p>"
    )


def _contents(results: Mapping[str, BaseResult], anchors: Mapping[str, str], known: Mapping[str, Sequence[str]]) -> str:
    lines = "".join(
        f'<li><a href="#{anchors[name]}">{escape(name)}</a> <span class=soft>{escape(titled(result))}; {len(known[name])} to know first</span></li>'
        for name, result in results.items()
    )
    return f'<nav aria-label="Contents"><h2 id="contents">Contents</h2><ol>{lines}</ol></nav>'


def _shared(
    unlike: Sequence[str], unfinished: Sequence[str], damaged: Mapping[str, str], code: Mapping[str, str]
) -> str:
    lines = [*unlike, *(f"unfinished run, left out: {name}" for name in unfinished)]
    lines += [f"damaged result, left out: {name}: {why}" for name, why in damaged.items()]
    by: dict[str, list[str]] = {}
    for name, version in code.items():
        by.setdefault(version, []).append(name)
    if len(by) > 1:
        said = "; ".join(f"{version} in {listed(names, 4)}" for version, names in by.items())
        lines.append(f"code of the package differs: {said}")
    if not lines:
        return ""
    return f'<h2 id="unlike">Not the same in all results</h2>{to_know(lines)}'


def _section(name: str, result: BaseResult, anchor: str, known: Sequence[str], code: str | None) -> str:
    warned = f'<h3 id="{anchor}-know">What to know first</h3>{to_know(known)}' if known else ""
    return (
        f'<section id="{anchor}"><h2>{escape(name)}: {escape(titled(result))}<small>{escape(result.QUESTION)}</small></h2>{measured(result)}'
        f"{warned}{_figures(result)}{_tables(result, anchor)}{note(result)}{_again(name, result, code)}"
        f'<p class=soft><a href="#contents">Contents</a></p></section>'
    )


def _figures(result: BaseResult) -> str:
    try:
        with quiet():
            figures = result.figures()
    except MechdiagError as error:
        return f"<p class=soft>No figure: {escape(str(error))}</p>"
    shown = "".join(
        f"<figure>{picture(figure, f'{titled(result)}: {name}')}</figure>" for name, figure in figures.items()
    )
    return f'<h3>Figures</h3><div class="figures">{shown}</div>' if shown else ""


def _tables(result: BaseResult, anchor: str) -> str:
    with quiet():
        tables = result.tables()
    return "<h3>Tables</h3>" + "".join(
        _table(title, frame, f"{anchor}-t{n}") for n, (title, frame) in enumerate(tables.items(), 1)
    )


def _table(title: str, frame: pd.DataFrame, anchor: str) -> str:
    if not len(frame):
        return f"<p class=soft>{escape(title)}: no line.</p>"
    table = table_html(frame, title, most=FIRST_LINES, sortable=True)
    if len(frame) <= FIRST_LINES:
        return f'<div class="scroll">{table}</div>'
    more, fewer = f"Show all {len(frame):,} lines", f"Show the first {FIRST_LINES}"
    return (
        f'<div class="scroll folded" id="{anchor}">{table}</div>'
        f'<button type=button class=all aria-controls="{anchor}" aria-expanded=false data-more="{more}" data-fewer="{fewer}">{more}</button>'
    )


def _again(name: str, result: BaseResult, code: str | None) -> str:
    facts = []
    for run, p in provenances(result).items():
        versions = ", ".join(f"{package} {v}" for package, v in p.get("versions", {}).items() if v)
        known = {
            "weights": f"sha256 {p['weights_sha256']}" if "weights_sha256" in p else "",
            "text": _texts(p),
            "SAEs": "; ".join(f"{sae} {s['sha256']}" for sae, s in p.get("saes", {}).items() if "sha256" in s),
            "versions": ", ".join(
                part for part in (f"Python {p['python']}" if "python" in p else "", versions) if part
            ),
            "machine": ", ".join(
                f"{p[what]}{' threads' * (what == 'threads')}" for what in ("device", "threads") if what in p
            ),
        }
        facts += [(f"{run}: {what}" if run else what, said) for what, said in known.items() if said]
    facts += [("code", code)] if code else []
    lines = "".join(f"<dt>{escape(what)}</dt><dd>{escape(said)}</dd>" for what, said in facts)
    steps = reproduction(result, name)
    again = f"<pre>{escape(steps)}</pre>" if steps else ""
    whole = escape(json.dumps(jsonable(result.provenance), indent=1, ensure_ascii=False))
    return (
        f'<details><summary>How to make it again</summary>{again}<dl class="facts">{lines}</dl></details>'
        f"<details><summary>All settings and counts (provenance)</summary><pre>{whole}</pre></details>"
    )


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
