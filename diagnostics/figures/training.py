"""How SAEs changed while they were trained: the metrics of a run of `train_saes`, read and drawn."""

import json
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diagnostics.figures.axes import legend_above, panels, write_caption
from diagnostics.figures.looks import REFERENCE, legend_label, looks, styled, swept_kind
from interventions.errors import ResultError

METRICS = "metrics.jsonl"
MANY = 12
"""SAEs that a legend can name one by one."""
DASHES = ("-", "--", ":", "-.")
_BANDS = (("a_05", "a_95", 0.12), ("a_25", "a_75", 0.25))


def training_metrics(folder: str | Path) -> pd.DataFrame:
    """The metrics of a training run: a line for each SAE and logged step, as `metrics.jsonl` in its folder has them.

    `sae`, `step`, `tokens`, `loss`, `fve`, `l0` (means over the tokens since the line before); as they stand at the step `dead`
    (share of latents that have not fired for the recipe's `dead_window` of the run's tokens: 0 before so many), `lr`, `threshold`,
    and of cosine scores `a_mean`, `a_sd`, `a_05` … `a_95`, quantiles of the exponents a_i. Raises `ResultError` for a folder
    without such a file, and for lines that a run did not write.
    """
    path = Path(folder) / METRICS
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        frame = pd.DataFrame(lines)
    except (OSError, ValueError) as error:
        raise ResultError(
            f"{path} cannot be read ({type(error).__name__}: {error}); give the folder of a run"
        ) from error
    if missing := [name for name in ("sae", "tokens", "fve", "dead") if name not in frame]:
        raise ResultError(f"{path} has no {missing[0]!r}; expected what a training run writes: give its folder")
    return frame


def plot_training(metrics: pd.DataFrame) -> Figure:
    """FVE, share of dead latents and, of cosine SAEs, exponents a_i against tokens; a line for each SAE of `training_metrics`.

    Of more than 12 SAEs the legend has kinds, without sparsity, seed and site, and the lines of a kind look alike.
    """
    names, cosine = list(dict.fromkeys(metrics["sae"])), "a_50" in metrics
    drawn: list[tuple[str, str]] = [
        ("fve", "fraction of variance explained"),
        ("dead", "share of latents that are dead"),
    ]
    drawn += [("a_50", "exponent aᵢ")] if cosine else []
    many = len(names) > MANY
    entries = {name: swept_kind(name) if many else name for name in names}
    style = looks(list(entries.values()))
    dashes: dict[str, str] = {}
    for i, entry in enumerate(dict.fromkeys(entries.values())):
        alike = sum(style[entry][0] == style[other][0] for other in dashes)  # kinds that share a colour
        dashes[entry] = DASHES[(alike if many else i) % len(DASHES)]
    with styled():
        figure, axes = panels(len(drawn), 3.4, 2.7, 1.0, least=6.8)
        for ax, (column, label) in zip(axes.flat, drawn, strict=False):
            said: set[str] = set()
            for name, entry in entries.items():
                some = metrics.loc[metrics["sae"] == name].dropna(subset=column)
                if len(some):
                    shown = None if entry in said else legend_label(entry)
                    _line(ax, some, column, shown, style[entry], dashes[entry])
                    said.add(entry)
            ax.set_xlabel("training tokens")
            ax.set_ylabel(label)
        if cosine:
            axes.flat[2].axhline(0, color=REFERENCE, lw=0.8)
        legend_above(figure, axes.flat[0], 4)
        words = "FVE on the training batches since the point before. Dead: silent for the recipe's dead_window of the run's tokens, so none is dead before so many."
        words += f" {len(names)} SAEs: lines of a kind look alike, whatever their sparsity, seed and site." * many
        write_caption(figure, words + " Exponents: median, with 25–75 % and 5–95 % of the latents." * cosine)
    return figure


def _line(ax: Axes, some: pd.DataFrame, column: str, label: str | None, look: tuple[str, str], dashes: str) -> None:
    marker = look[1] if len(some) < 2 else None
    ax.plot(some["tokens"], some[column], lw=1.2, marker=marker, label=label, color=look[0], ls=dashes)
    for low, high, alpha in _BANDS if column == "a_50" else ():
        ax.fill_between(some["tokens"], some[low], some[high], color=look[0], alpha=alpha, lw=0)
