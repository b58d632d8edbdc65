"""KL against dose: edits of equal length along directions that differ in meaning, by depth, beside randomly initialised models."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from diagnostics.commands import command
from diagnostics.commands.inputs import PatchingOptions, check_distinct
from diagnostics.commands.ranges import PositiveInt, Range
from diagnostics.dose.choices import DOSES
from interventions.errors import MechdiagError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class DoseResponseOptions(PatchingOptions):
    """How much does the model's output change with the size of an edit?

    Moves activations by a share of their own norm: towards another token's activation, towards a difference of two other
    tokens, towards a random direction, norm up, norm down, and along directions that you give (a steering vector, for
    example); measures KL(clean || intervened) in nats and the direct effect. Writes a table (Parquet), its tokens, a summary with
    provenance (JSON) and two figures into --out.

    Examples:
      scripts/dose_response.py --layers 7 22 --null-model random --out results/dose
      scripts/dose_response.py --layers 15 --directions steering.npy --out results/steering
    """

    doses: tuple[Annotated[float, Range(0, 2, above=True)], ...] = DOSES
    """||dx|| / ||x||, above 0 and up to 2"""
    tokens: PositiveInt = 200
    """edited tokens, the same at every depth"""
    directions: tuple[Path, ...] = ()
    """.npy or .pt files, each with one vector [d_model]; named after the file"""


def main(options: DoseResponseOptions) -> command.Document:
    """Run the command."""
    from diagnostics.dose.result import DoseResponse
    from diagnostics.dose.run import dose_response
    from diagnostics.results.result import result_files
    from diagnostics.running.clean import default_layers

    options.check(result_files(DoseResponse))
    check_distinct([path.stem for path in options.directions], "directions")
    directions = {path.stem: _direction(path) for path in options.directions}
    model, prompts = options.load()
    sites = options.places(default_layers(model.n_layers))
    how = options.common() | options.named("doses", "tokens") | {"directions": directions}
    return options.measure("applying doses", "row", dose_response, model, prompts, sites=sites, **how)


def _direction(path: Path) -> torch.Tensor:
    """A vector of real numbers. Raises `MechdiagError` for a file that holds anything else."""
    import numpy as np
    import torch

    found = None
    try:
        if path.suffix == ".npy":
            found = torch.from_numpy(np.load(path, allow_pickle=False))
        elif path.suffix == ".pt":
            found = torch.load(path, weights_only=True, map_location="cpu")
    except (OSError, ValueError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise MechdiagError(f"cannot read direction {path}: {why}") from error
    if not isinstance(found, torch.Tensor) or found.is_complex():
        raise MechdiagError(f"no direction in {path}; expected a .npy or .pt file with one vector [d_model]")
    return found.float()


def run() -> None:
    """The command line of `scripts/dose_response.py`."""
    command.run(DoseResponseOptions, main)
