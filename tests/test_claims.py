"""Every finding in docs/findings.md and docs/results has a line in docs/claims.md, and its numbers are those of the committed results."""

import re
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import least_squares

from tests.claims import DOCS, VERDICTS, claims, page, table

ROOT = DOCS.parent
CLAIMS = claims()


def flat(text: str) -> str:
    """Words without emphasis, links or line breaks."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"\s+", " ", text.replace("*", "")).strip()


def test_page_of_claims_is_current():
    assert (DOCS / "claims.md").read_text() == page(), "run: python -m tests.claims"


def test_every_claim_is_complete():
    assert len(CLAIMS) >= 40
    for claim in CLAIMS:
        assert claim["verdict"] in VERDICTS and claim["claim"] and claim["estimate"] and claim["control"], claim


@pytest.mark.parametrize("claim", [c for c in CLAIMS if c["quoted"]], ids=lambda c: str(c["claim"])[:60])
def test_quoted_sentences_have_the_numbers_of_the_data(claim):
    for quoted in claim["quoted"]:
        assert flat(quoted["text"]) in flat((ROOT / quoted["page"]).read_text()), quoted


RESULTS = sorted((DOCS / "results").glob("*.md"))


def findings(text: str) -> list[str]:
    """The bullets and tables of a page, and its other paragraphs with a decimal number, less those of commands, headings and pictures."""
    blocks = re.split(r"\n\s*\n|\n(?=- )", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    kept = []
    for block in (b.strip() for b in blocks):
        if block.startswith(("- ", "|")) or (re.search(r"\.\d", block) and not re.match(r"`|#|!\[", block)):
            kept.append(flat(block))
    return kept


@pytest.mark.parametrize("page", ["docs/findings.md", *(f"docs/results/{p.name}" for p in RESULTS)])
def test_every_finding_is_quoted_by_a_claim(page):
    """Each bullet and table, and each paragraph that has a decimal number."""
    text = (ROOT / page).read_text()
    said = [flat(c["text"]) for claim in CLAIMS for c in claim["quoted"] if c["page"] == page]
    blocks = findings(text)
    assert blocks
    assert [block[:100] for block in blocks if not any(s in block for s in said)] == []


def test_every_committed_result_is_used():
    used = {f"{t}{end}" for c in CLAIMS for t in c["tables"] for end in (".csv", ".json")}
    assert {path.name for path in Path(DOCS / "results" / "data").iterdir()} == used


def test_derived_numbers_on_the_scaling_laws_page():
    """Recomputed from the table of losses: shares removed by doubling n, equally good laws, least squares."""
    runs = table("scaling").query("part == 'loss' and condition == 'base' and what == 'nmse' and seed == 0")
    removed = 100 * (1 - runs.pivot(index="n", columns="k", values="value").pct_change().dropna().add(1))
    assert [round(f(removed.loc[n])) for n in (288, 2304) for f in (min, max)] == [10, 12, 4, 6]
    assert (removed.diff().dropna() < 0).all(axis=None)

    n, k, log_loss = runs["n"].to_numpy(), runs["k"].to_numpy(), np.log(runs["value"].to_numpy())
    narrow, u, v = n < 2304, np.log(k), np.log(n)

    def misfit(law):
        first = law[0] + law[1] * u + law[2] * v + law[3] * u * v
        return (np.logaddexp(first, law[4] + law[5] * u) if len(law) > 4 else first) - log_loss

    def objective(law, runs):
        r = np.abs(misfit(law)[runs])
        return np.where(r <= 1e-3, r**2 / 2, 1e-3 * (r - 5e-4)).sum()

    def error(law):
        return round(np.abs(misfit(law)[~narrow]).mean(), 3)

    table_law = [1.77568, -0.246558, -0.582285, -1.03394e-07, -0.639097, -0.246559]
    low, high = [0.7604, -0.2563, -0.3366, 0, -0.8051, -0.2563], [2.5035, -0.2428, -0.7483, 0, -0.5933, -0.2428]
    for law, floor in ((low, 0.220), (high, 0.282)):
        assert objective(law, n > 0) == pytest.approx(objective(table_law, n > 0), rel=1e-4)
        assert round(np.exp(law[4] + law[5] * np.log(16)), 3) == floor
    assert (np.sign(misfit(table_law)) == np.where(np.isin(k, (8, 64)), 1, -1)).all()
    laws = {
        0.010: [0.978, -0.2458, -0.4296, 0, -0.6954, -0.2458],
        0.057: [0.5814, -0.2493, -0.1827, 0, -2.0447, -0.2493],
        0.022: [0.35245, -0.23421, -0.11689, -0.00133],
        0.066: [0.17848, -0.10677, -0.09249, -0.02022],
    }
    fitted = [1.1174, -0.2493, -0.4205, 0, -0.7538, -0.2493]  # the joint law to n <= 1,152
    for expected, law in laws.items():
        assert error(law) == expected
        assert objective(law, narrow) == pytest.approx(objective(fitted, narrow), rel=1e-4)
    squares = [least_squares(lambda x: misfit(x)[narrow], law).x for law in (fitted, laws[0.022])]
    assert [error(law) for law in squares] == [0.015, 0.053]
