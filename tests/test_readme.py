"""What the README promises, beside its snippet, which `test_wheel` runs, and its links, which `test_docs` follows."""

import re
from pathlib import Path

from tests.first_minutes import LINES, WORDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_is_short():
    assert len(README.split()) <= WORDS and len(README.splitlines()) <= LINES


def test_named_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([\w-]+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_every_diagnostic_is_named():
    """Each public function of `diagnostics` that gives a result, except those that only load or collect results."""
    import diagnostics

    named = set(re.findall(r"`(\w+)`", README))
    functions = {name for name in diagnostics.__all__ if name[0].islower()}
    assert functions - named == {"latent_cards", "report", "saved_results"}
