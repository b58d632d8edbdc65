"""How the documentation is built: `make docs`. Nothing that it shows is fetched from a network, equations included."""

import re
import sys
from importlib.metadata import version as installed
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import equations  # noqa: E402
import first_use  # noqa: E402
import reference  # noqa: E402
import unbroken  # noqa: E402

from diagnostics.figures.looks import PAGE_COLOURS  # noqa: E402

project = "mechdiag"
author = "the mechdiag authors"
version = release = installed(project)
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx_copybutton"]
exclude_patterns = ["_build"]
suppress_warnings = ["toc.empty_glob"]
smartquotes_action = "qe"  # quotes and ellipses; the dashes of `--out` stay

html_theme = "furo"
html_title = f"mechdiag {release}"
html_static_path = ["_static"]
html_css_files = ["mechdiag.css", "result_colours.css"]
html_copy_source = False
html_show_copyright = html_show_sphinx = False
html_math_renderer = "mathml"
html_theme_options = {"navigation_with_keys": True}

nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath", "amsmath", "deflist", "colon_fence"]
myst_heading_anchors = 3
myst_dmath_double_inline = True
copybutton_exclude = ".linenos, .gp"

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
autodoc_class_signature = "mixed"
python_maximum_signature_line_length = 90
python_display_short_literal_types = True
add_module_names = False
toc_object_entries_show_parents = "hide"

# Every reference between our own pages and objects must resolve. Types of other packages are named and not linked, for
# their indexes would have to be fetched; so are shapes, which are no objects.
nitpicky = True
nitpick_ignore = [
    ("py:class", "diagnostics.figures.by_depth.DepthPlan"),  # how a figure is drawn, no part of the interface
    ("py:class", "diagnostics.commands.ranges.Range"),  # the range of an option, which its help states
    ("py:class", "interventions.replaying.chunks.Asked"),  # what a chunk is asked for, no part of the interface
    ("py:class", "sae_models.training.runs.Team"),  # who trains, which workers' `team()` gives
    ("py:class", "diagnostics.running.ray_pool.RayPool"),  # what `workers` yields, for the bench
    ("py:class", "diagnostics.results.result.R"),  # type variables
    ("py:class", "diagnostics.running.single_edits.R"),
]
nitpick_ignore_regex = [(r"py:.*", r"(?!(interventions|sae_models|diagnostics)\.).*")]


# The notebooks of the site are copies, whose links start one folder lower; their outputs are those committed.
COPIES = Path(__file__).parent / "notebooks"
COPIES.mkdir(exist_ok=True)
for notebook in (ROOT / "notebooks").glob("*.ipynb"):
    text = notebook.read_text(encoding="utf-8").replace("](../docs/", "](../")
    if not (copy := COPIES / notebook.name).exists() or copy.read_text(encoding="utf-8") != text:
        copy.write_text(text, encoding="utf-8")

# Results in notebooks have the theme of the page, where a reader chose one, and not that of the system.
RESULT_COLOURS = [
    f'body[data-theme="{theme}"] .mdc {{ color-scheme: {theme}; {" ".join(f"--{name}: {c};" for name, c in own.items())} }}\n'
    for theme, own in PAGE_COLOURS.items()
]
(ROOT / "docs/_static/result_colours.css").write_text("".join(RESULT_COLOURS), encoding="utf-8")


def _to_the_copies(_app, _page, source):
    source[0] = re.sub(r"\]\(\.\./((?:\.\./)*notebooks/)", r"](\1", source[0])


def setup(app):
    app.connect("source-read", _to_the_copies)
    equations.setup(app)
    first_use.setup(app)
    reference.setup(app)
    unbroken.setup(app)
