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


def test_every_finding_of_the_readme_is_quoted():
    """Each bullet of `What came out`."""
    text = (ROOT / "README.md").read_text().split("## What came out")[1].split("\n## ")[0]
    said = [flat(c["text"]) for claim in CLAIMS for c in claim["quoted"] if c["page"] == "README.md"]
    bullets = [flat(part) for part in re.split(r"\n- ", text)[1:]]
    assert bullets and all(any(s in bullet for s in said) for bullet in bullets)


def test_committed_results_are_used_and_say_how_they_were_made():
    used = {f"{t}{end}" for c in CLAIMS for t in c["tables"] for end in (".csv", ".json")}
    assert {path.name for path in Path(DOCS / "results" / "data").iterdir()} == used
