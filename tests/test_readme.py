"""What the README promises beside what `test_snippets` and `test_docs` run and follow on every page."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_first_notebook_block_has_six_lines():
    block = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert block is not None
    assert len(block[1].strip().splitlines()) == 6


def test_scripts_and_targets_named_in_prose_exist():
    for path in re.findall(r"scripts/\w+\.py", README):
        assert (ROOT / path).is_file(), path
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([\w-]+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_no_placeholder_is_left():
    assert not re.search(r"\b[A-Z]+_(TABLE|SECTION)\b", README)
