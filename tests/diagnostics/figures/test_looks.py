"""Looks differ between kinds, do not depend on the other series, and are named in one module."""

import ast
from pathlib import Path

import matplotlib
from matplotlib.colors import is_color_like

import diagnostics
from diagnostics.figures.looks import COLOURS, CONDITION_LOOKS, LABELS, SAE_LOOKS, legend_looks, looks, sae_kind


def test_looks_differ():
    assert len(set(COLOURS.values())) == len(COLOURS) and len(set(LABELS.values())) == len(LABELS)
    names = [*SAE_LOOKS, *(f"sae {i}" for i in range(15))]
    found = looks(names)
    assert len(set(found.values())) == len(names)
    assert len({colour for colour, _ in SAE_LOOKS.values()}) == len({marker for _, marker in SAE_LOOKS.values()}) == 5
    assert len({looks(["a", "b", "c", "d", "e", "f"])[name][0] for name in "abcdef"}) == 6, "colours before markers"


def test_looks_do_not_depend_on_depth_seed_or_other_series():
    alone = looks(["15/cosine-seed2"])["15/cosine-seed2"]
    assert set(looks(["7/cosine", "15/cosine", "15/cosine-seed1"]).values()) == {alone}
    assert looks(["a/other", "22/cosine"])["22/cosine"] == alone == looks(["cosine", "x", "y"])["cosine"]
    assert looks(["7/other", "9/other"])["7/other"] != alone
    other = looks(["7/other"])["7/other"]
    assert other == looks(["standard", "3/other", "bypass"])["3/other"]
    assert looks(["x", "y", "z"]) == looks(["z", "x", "y"])


def test_kind_of_an_sae():
    kinds = {"15/cosine-seed1": "cosine", "a/b/mine": "mine", "standard": "standard", "seed1": "seed1"}
    assert {name: sae_kind(name) for name in kinds} == kinds


def test_seeds_share_a_legend_entry():
    found = legend_looks(["standard", "cosine", "cosine-seed1", "cosine-seed2", "7/bypass", "15/bypass"])
    assert list(found) == ["standard", "cosine (3 seeds)", "7/bypass", "15/bypass"]
    assert found["cosine (3 seeds)"] == SAE_LOOKS["cosine"] and found["7/bypass"] == SAE_LOOKS["bypass"]


def test_conditions_do_not_look_like_saes():
    assert not {colour for colour, _ in SAE_LOOKS.values()} & {colour for colour, _, _ in CONDITION_LOOKS.values()}


def test_only_the_looks_module_names_colours():
    """Greys such as "0.6", hex codes, names of more than one letter, `C0`, and colour maps. CSS stands in longer texts."""
    named = {}
    for path in Path(diagnostics.__file__).parent.rglob("*.py"):
        if path.parent.name == "pairs":  # words of prompts (Peru is a colour too); it draws nothing
            continue
        found = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        words = {w for w in found if isinstance(w, str) and len(w) > 1 and w.lower() != "none" and not w.isdigit()}
        named[path.name] = {word for word in words if is_color_like(word) or word in matplotlib.colormaps}
    assert {name for name, some in named.items() if some} == {"looks.py"}, named
