"""The README does what it says: its Python runs as written, its commands exist."""

import re
import runpy
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from interventions import texts

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.model
@pytest.mark.filterwarnings("ignore")
def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    """As written, on the beginnings of the packaged texts: what they cost is the model's time for each token."""
    whole = texts.load_texts

    def beginnings(*args, **options):
        found = whole(*args, **options)
        return replace(found, texts=[" ".join(text.split()[:24]) for text in found.texts])

    monkeypatch.setattr(texts, "load_texts", beginnings)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 10
    script = tmp_path / "readme.py"  # a file: nnsight reads the source of the code around a trace
    script.write_text("\n".join(blocks), encoding="utf-8")
    space = runpy.run_path(str(script))
    result = space["result"]
    assert "KL direction" in result._repr_html_()
    plt.close(result.plot())
    assert {"direction", "norm", "self"} <= set(result.to_frame().edit)
    assert space["effects"].path == "replay"
    assert tuple(space["logits"].shape) == (1, 5, 49152)
    assert "Latent" in space["card"]._repr_html_() and len(space["atlas"].frame) > 500


def test_first_notebook_block_has_seven_lines():
    block = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert block is not None
    assert len(block[1].strip().splitlines()) == 7


def test_commands_and_files_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for path in [*re.findall(r"scripts/\w+\.py", README), *re.findall(r"\]\((docs/[^)]+)\)", README)]:
        assert (ROOT / path).is_file(), path
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_no_placeholder_is_left():
    assert not re.search(r"\b[A-Z]+_(TABLE|SECTION)\b", README)
