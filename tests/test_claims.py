"""Every finding in README and docs/results has a line in docs/claims.md, and its numbers are those of the committed results."""

import re
from pathlib import Path

import pytest

from tests.claims import DOCS, VERDICTS, claims, page

ROOT = DOCS.parent
CLAIMS = claims()


def flat(text: str) -> str:
    """Words without emphasis, links or line breaks."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"\s+", " ", text.replace("*", "")).strip()


def test_the_page_is_that_of_the_list():
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


@pytest.mark.parametrize("page", ["README.md", *(f"docs/results/{p.name}" for p in RESULTS)])
def test_every_finding_is_quoted_by_a_claim(page):
    """Each bullet and table of `What came out` and of docs/results, and each paragraph that has a decimal number."""
    text = (ROOT / page).read_text()
    if page == "README.md":
        text = text.split("## What came out")[1].split("\n## ")[0]
    said = [flat(c["text"]) for claim in CLAIMS for c in claim["quoted"] if c["page"] == page]
    blocks = findings(text)
    assert blocks
    assert [block[:100] for block in blocks if not any(s in block for s in said)] == []


def test_committed_results_are_used_and_say_how_they_were_made():
    used = {f"{t}{end}" for c in CLAIMS for t in c["tables"] for end in (".csv", ".json")}
    assert {path.name for path in Path(DOCS / "results" / "data").iterdir()} == used
