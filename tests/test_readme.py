"""What the README promises beside what `test_snippets` and `test_docs` run and follow on every page."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_is_read_in_a_few_minutes():
    assert len(README.split()) <= 750 and len(README.splitlines()) <= 120


def test_targets_named_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([\w-]+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_every_question_is_in_the_table():
    """Each public function of `diagnostics` that gives a result, but for those that only load or collect."""
    import diagnostics

    named = set(re.findall(r"`(\w+)`", README))
    functions = {name for name in diagnostics.__all__ if name[0].islower()}
    assert functions - named == {"latent_cards", "report", "saved_results"}


@pytest.mark.model
@pytest.mark.filterwarnings("ignore")
def test_the_first_snippet_prints_what_is_shown():
    """The same lines; numbers to a hundredth, since another processor may round otherwise."""
    assert README.count("```python") == 1
    code, shown = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", README, flags=re.DOTALL).groups()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(compile(code, "README.md", "exec"), {})
    printed, expected = (text.split() for text in (said.getvalue(), shown))
    assert len(printed) == len(expected) > 10
    for one, other in zip(printed, expected, strict=True):
        assert one == other or float(one) == pytest.approx(float(other), abs=0.011)
