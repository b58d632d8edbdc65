"""README and documentation do what they say: their Python runs as written, page by page, and their commands parse."""

import ast
import copy
import os
import re
import runpy
import shlex
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

import interventions
from diagnostics.commands import command
from diagnostics.commands import options as command_line
from interventions.models import loading
from interventions.texts import labelled
from interventions.texts import prompts as texts
from mechdiag import command as mechdiag_command

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if path.name != "extending.md"  # whose files `test_extending` writes and runs
}
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", flags=re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: (\S.*?) -->\n\s*```python")
WORDS = 12  # of each text: what the blocks cost is the model's time for each token


def blocks(page: str, *languages: str) -> list[str]:
    """The code blocks of a page in some languages, in order, without those that are marked."""
    text = NOT_RUN.sub("```skipped", PAGES[page])
    return [code for _, language, code in BLOCK.findall(text) if language in languages]


LONG = {
    *(f"docs/diagnostics/{name}.md" for name in (
        "activation_patching", "ablation_sparsity", "atlas", "atom_substitution", "causal_concentration", "causal_dimension", "coalitions",
        "dictionary_comparison", "dictionary_effects", "disentanglement", "dose_response", "edges", "feature_ablation", "interactions",
        "latent_card", "latent_steering", "polarity_effects", "probe_perturbation", "projections", "sae_evaluation", "scaling_laws",
        "specification_curve", "unit_norm", "win_rate",
    )),
    "docs/activation_patching.md", "docs/engine.md", "docs/questions/do_i_get_the_same_in_nnsight.md",
    "docs/questions/is_my_steering_vectors_effect_more_than_dose.md", "docs/questions/which_latents_are_causally_inert.md",
}  # fmt: skip
"""Pages that take five seconds or more, of functions that other tests call too: `make pages` runs them, the daily tests the others."""


def with_python() -> list[str]:
    """Without README, whose output `test_wheel` compares."""
    left_out = {"README.md"} | (set() if os.environ.get("MECHDIAG_ALL_PAGES") else LONG)
    return [page for page in PAGES if page not in left_out and blocks(page, "python")]


_load = loading.load_model


@cache
def the_model(name, options):
    return _load(name, **dict(options))


def a_model(name=loading.DEFAULT_MODEL, **options):
    """A model of its own, as each block expects, whose weights are those of the one that is loaded once."""
    if not isinstance(name, (str, Path)):
        return _load(name, **options)
    loaded = the_model(name, tuple(sorted(options.items())))
    tensors = [*loaded.hf.parameters(), *loaded.hf.buffers(), loaded.tokenizer]
    return copy.deepcopy(loaded, {id(shared): shared for shared in tensors})


def beginnings(function):
    """The same function of texts, which gives the beginning of each."""

    def shortened(*args, **options):
        found = function(*args, **options)
        return replace(found, texts=[" ".join(text.split()[:WORDS]) for text in found.texts])

    return shortened


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A reader's place: an empty folder, a model that is there at once, short texts."""
    monkeypatch.chdir(tmp_path)
    for module in (interventions, loading):
        monkeypatch.setattr(module, "load_model", a_model)
    monkeypatch.setattr(texts, "load_texts", beginnings(texts.load_texts))
    monkeypatch.setattr(labelled, "load_labelled", beginnings(labelled.load_labelled))
    yield tmp_path
    plt.close("all")


@pytest.mark.model
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", with_python())
def test_python_blocks_run_in_order(page, reader):
    """Run as written; an expression on a block's last line is displayed, as in a notebook."""
    shown: list[str] = []
    script = reader / "blocks.py"  # a file: nnsight reads the source of the code around a trace
    script.write_text("\n".join(map(_showing, blocks(page, "python"))), encoding="utf-8")
    runpy.run_path(str(script), {"_shows": lambda value: shown.append(_html(value))})
    assert all(shown)


def _showing(code: str) -> str:
    last = ast.parse(code).body[-1]
    alone = isinstance(last, ast.Expr) and isinstance(last.value, (ast.Name, ast.Attribute))
    return f"{code}\n_shows({ast.unparse(last)})" if alone else code


def _html(value) -> str:
    html = getattr(value, "_repr_html_", None)
    return repr(value) if html is None else html()


def test_pages_run_only_by_make_pages_exist():
    assert all(page in PAGES and blocks(page, "python") for page in LONG)


def test_no_block_is_marked_as_not_run():
    """A page may say why one of its blocks cannot run; at present none does."""
    assert sum(len(NOT_RUN.findall(text)) for text in PAGES.values()) == 0


def test_every_block_has_a_known_language():
    """Nobody checks blocks in other languages."""
    known = {"python", "sh", "text", "json", "csv", "diff"}
    for page, text in PAGES.items():
        assert {language for _, language, _ in BLOCK.findall(text)} <= known, page


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for code in blocks(page, "sh"):
            lines = code.replace("\\\n", " ").splitlines()
            found += [(page, words) for line in lines if (words := re.sub(r"(^|\s)#.*", "", line).strip())]
    return found


def test_commands_parse(monkeypatch):
    """Every script, option and value given is valid, and every target of make exists."""
    parsed = []

    def parse_alone(settings, words=None):
        parsed.append(command_line.parsed(settings, words))
        raise SystemExit(0)

    monkeypatch.setattr(command, "parsed", parse_alone)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page, line in commands():
        words = shlex.split(line)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words[0].startswith("python"):
            words = words[1:]
        if words[0] == "make":
            targets = [word for word in words[1:] if "=" not in word]
            assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets), (page, line)
        elif words[:2] == ["mechdiag", "--help"]:
            continue
        elif words[0] not in ("pip", "git", "cd", "jupyter", "source"):
            script = ROOT / words[0]
            assert words[0] == "mechdiag" or (script.parent == ROOT / "scripts" and script.is_file()), (page, line)
            monkeypatch.setattr(sys, "argv", words)
            with pytest.raises(SystemExit) as ended:
                mechdiag_command.main() if words[0] == "mechdiag" else runpy.run_path(str(script), run_name="__main__")
            assert ended.value.code == 0, (page, line)
    assert len(parsed) > 5
