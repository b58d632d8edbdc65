"""The look of every figure, said once: type, colours that colour-blind readers tell apart, markers, and what things are called."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any
from zlib import crc32

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.ticker import LogFormatter

# Loaded here: a notebook's backend that is loaded within `rc_context` loses its interactive mode with it, and a reader's own
# figures are then never shown.
plt.switch_backend(matplotlib.get_backend())
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "text.parse_math": False,  # names of models, SAEs, texts and directions are shown as they are, whatever `$` and `_` they hold
}
FILE_STYLE: dict[Any, Any] = {"pdf.fonttype": 42, "svg.hashsalt": "mechdiag"}
"""Of saved figures: text stays text in a PDF, and equal figures give equal files."""
plt.rcParams["svg.hashsalt"] = FILE_STYLE["svg.hashsalt"]  # for figures that a user saves


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Figures made within are in our style, and no text in them is read as mathematics, but for the powers of ten of log axes."""
    before = plt.get_fignums()
    with plt.rc_context(STYLE):
        yield
    for number in sorted(set(plt.get_fignums()) - set(before)):
        for axis in (axis for ax in plt.figure(number).axes for axis in (ax.xaxis, ax.yaxis)):
            ticks = [(axis.get_major_formatter(), axis.majorTicks), (axis.get_minor_formatter(), axis.minorTicks)]
            for tick in (tick for formatter, some in ticks if isinstance(formatter, LogFormatter) for tick in some):
                tick.label1.set_parse_math(True)
                tick.label2.set_parse_math(True)


def legend_label(name: str) -> str:
    """A name as the label of a line. matplotlib leaves out of legends what is empty or begins with an underscore: a space without width comes first."""
    return f"\u200b{name}" if name[:1] in ("", "_") else name


CAPTION_SIZE = 7
INK, OPEN = "black", "white"
"""Marks that stand for no SAE and no edit; the face of open markers."""
KEY, NOTE = "0.3", "0.35"
"""Legend entries for a marker or dash in any colour; words inside a panel."""
REFERENCE, GRID = "0.6", "0.85"
"""Lines at values that mean something (no effect, chance, y = x); lines that only separate."""
NOISE, NULL, UNTRAINED, DEAD, OTHER = "0.4", "0.6", "0.65", "0.75", "0.5"
"""The noise floor; shuffled labels; randomly initialised models; latents that never fire; whatever has no colour of its own."""
BAND, MISSING = "0.86", "0.93"
"""A predicted range; cells without a value."""
NORMS, SHARES, SIGNED = "viridis", "Blues", "RdBu_r"
"""Colour maps of norms, of shares from 0 to 1, and of values of either sign."""
# Okabe and Ito's palette: told apart by colour-blind readers, and in print.
COLOURS = {
    "direction": "#0072B2",
    "norm": "#D55E00",
    "placebo_direction": "#56B4E9",
    "placebo_token": "#009E73",
    "placebo_norm": "#E69F00",
    "in_place": "#000000",
    "single_token": "#CC79A7",
}
LABELS = {
    "direction": "direction patch",
    "norm": "norm patch",
    "placebo_direction": "   its placebo, isotropic tangent",
    "placebo_token": "   its placebo, tangent between tokens",
    "placebo_norm": "   its placebo: rotation by the same distance",
    "in_place": "in context",
    "single_token": "as the only token",
}
MARKERS = {"direction": "o", "norm": "s", "placebo_direction": "^", "placebo_token": "v", "placebo_norm": "D"}
EDIT_COLOURS = {
    "toward_token": COLOURS["direction"],
    "between_tokens": COLOURS["placebo_token"],
    "isotropic": COLOURS["placebo_direction"],
    "norm_up": COLOURS["norm"],
    "norm_down": COLOURS["placebo_norm"],
}
EDIT_LABELS = {
    "toward_token": "towards another token",
    "between_tokens": "towards a difference of two other tokens",
    "isotropic": "towards a random direction",
    "norm_up": "norm up",
    "norm_down": "norm down (dose 1: zero ablation)",
}
EDIT_MARKERS = {"toward_token": "o", "between_tokens": "v", "isotropic": "^", "norm_up": "s", "norm_down": "D"}
GIVEN = ("#CC79A7", "#000000", "#882255")
"""Colours of directions that the user gives."""
SCORE_LOOKS = {
    "delta_norm": ("0.45", "o"), "z": ("0.45", "x"), "cosine": ("#56B4E9", "v"), "inner": ("#E69F00", "^"),
    "direct": ("#CC79A7", "D"), "gradient": ("#0072B2", "s"), "integrated": ("#009E73", "P"), "fisher": ("#D55E00", "*"),
    "second_order": ("#000000", "X"),
}  # fmt: skip
"""Colour and marker of the scores of an atlas."""
PLACEBO_LOOKS = {"placebo_token": ("0.25", "v", "--"), "placebo_isotropic": ("0.6", "^", ":")}
"""Colour, marker and dashes of placebos, in every figure of latents' edits."""
PLACEBO_LABELS = {"placebo_token": "placebo, between tokens", "placebo_isotropic": "placebo, isotropic"}
VERDICT_LOOKS = {
    "more than dose": ("#D55E00", "o"), "no more than dose": ("#0072B2", "s"), "small": ("0.55", "v"), "silent": ("0.8", "x"),
}  # fmt: skip
"""Colour and marker of what is said of single latents."""
METRIC_LOOKS = {"fisher": ("#0072B2", "o"), "logits": ("#D55E00", "s")}
"""Colour and marker of the metrics of causal dimensionality."""
SPAN_LOOKS = {
    "eigenvectors": ("0.6", "^", ":"), "most_active": ("#0072B2", "o", "-"), "principal": ("#009E73", "s", "--"),
    "random": ("0.4", "x", "--"),
}  # fmt: skip
"""Colour, marker and dashes of spans of directions."""
PREDICTION_LOOKS = {
    "trie": ("#0072B2", "o"), "one": ("#56B4E9", "v"), "tokens_seen": ("#E69F00", "D"), "tokens_best": ("#D55E00", "s"),
    "one_token": ("#CC79A7", "P"),
}  # fmt: skip
"""Colour and marker of what predicts where a latent is active: patterns and sets of tokens."""
EXCHANGE_LOOKS = {"pca": ("#009E73", "^", "--"), "subspace": ("#CC79A7", "v", "--"), "das": ("#882255", "X", ":")}
"""Colour, marker and dashes of exchanged directions that are no SAE's."""
EXCHANGE_LABELS = {
    "pca": "principal components", "subspace": "subspace read by gradients", "das": "learned subspace", "whole": "the whole activation",
    "mask": "learned mask", "all": "all latents",
}  # fmt: skip
FLOORS = {"random": ("0.55", "--"), "placebo": ("0.7", ":")}
"""Colour and dashes of what selected latents are compared with."""
CONDITION_LOOKS = {"single": ("#332288", "o", "-"), "partner": ("#999933", "s", "-"), "joint": ("#882255", "D", "-")}
"""Colour, marker and dashes of steering one latent, its partner, both: no colour of an SAE of the zoo."""
POLARITY_LOOKS = {
    "signed_gated_tied": ("#0072B2", "o"), "abstopk": ("#009E73", "^"), "gated": ("#D55E00", "s"), "topk": ("#E69F00", "D"),
    "pca": ("0.4", "v"), "random": ("0.65", "P"),
}  # fmt: skip
"""Colour and marker of SAEs with signed and unsigned latents on planted pairs, and of what they are compared with."""
K_COLOURS = ("#332288", "#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7")
"""Of numbers of active latents, ascending."""
SAE_LOOKS = {
    "standard": ("#0072B2", "o"),
    "cosine": ("#D55E00", "s"),
    "cosine-global": ("#009E73", "^"),
    "bypass": ("#CC79A7", "D"),
    "aligned": ("#E69F00", "v"),
}
"""Colour and marker of the architectures of the zoo."""
_OTHER_COLOURS = ("#56B4E9", "#8C6D31", "#882255", "#332288", "#999933", "#000000")
_OTHER_MARKERS = ("P", "X", "h", "<", ">", "p")
"""Of kinds that the zoo does not know."""
PAGE_COLOURS = {
    "light": {
        "ink": "#1b1f24", "soft": "#57606a", "line": "#d8dee4", "page": "#fff", "panel": "#f6f8fa", "mark": "#0072b2",
        "minus": "#b34e00", "all": "#c3c9d0", "pos": "86 180 233", "neg": "240 150 50", "effect": "27 31 36",
    },
    "dark": {
        "ink": "#e6e9ee", "soft": "#a3adb8", "line": "#3a424c", "page": "#14181d", "panel": "#1d232a", "mark": "#56b4e9",
        "minus": "#f0993c", "all": "#4d5762", "pos": "0 114 178", "neg": "176 84 0", "effect": "240 243 246",
    },
}  # fmt: skip
"""CSS variables of HTML pages, light and dark; red, green and blue where a page shades a colour by its opacity."""
_SEED = re.compile(r"-seed\d+$")
SPARSITY = re.compile(r"-(k|l1_)[\d.e-]*\d(?=$|/|-seed)")
"""What the names of SAEs of one sweep differ in."""


def sae_kind(name: str) -> str:
    """What follows the last `/` of an SAE's name, without the number of a seed: `15/cosine-seed1` is a `cosine`."""
    return _SEED.sub("", name.rsplit("/", 1)[-1])


def swept_kind(name: str) -> str:
    """The kind without its sparsity: `15.mlp_out/gated-l1_0.1-seed1` is a `gated`."""
    return SPARSITY.sub("", sae_kind(name))


def legend_names(names: list[str]) -> dict[str, str]:
    """Each SAE's entry in a legend; seeds of one kind, which look alike, have one: `cosine (3 seeds)`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_SEED.sub("", name), []).append(name)
    return {
        name: own[0] if len(own) == 1 else f"{kind} ({len(own)} seeds)" for kind, own in groups.items() for name in own
    }


def legend_looks(names: list[str]) -> dict[str, tuple[str, str]]:
    """`looks` of the entries of a legend, `legend_names`."""
    found = looks(names)
    return {entry: found[name] for name, entry in legend_names(names).items()}


def looks(names: list[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each SAE: those of its kind (`sae_kind`), in every figure, at all depths, for all seeds and in any order.

    Kinds that the zoo does not know get theirs by a hash of their name; only where two of one figure meet in one look does the
    later one by name take the next.
    """
    found, n = dict(SAE_LOOKS), len(_OTHER_COLOURS)
    for kind in sorted({sae_kind(name) for name in names} - set(found)):
        start, taken = crc32(kind.encode()) % n, set(found.values())
        order = [
            (_OTHER_COLOURS[(start + i) % n], _OTHER_MARKERS[(start + i + turn) % n])
            for turn in range(n)
            for i in range(n)
        ]
        found[kind] = next((look for look in order if look not in taken), order[0])
    return {name: found[sae_kind(name)] for name in names}
