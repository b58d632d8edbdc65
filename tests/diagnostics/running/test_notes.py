"""Notes of units as one: nothing that one unit says is lost to another's."""

import numpy as np
import pandas as pd
import torch

from diagnostics.running.notes import how_measured, merged, noted
from diagnostics.running.units import Unit, UnitResult
from interventions.effects import Effects


def effects(path: str, delta: float, why: str | None = None, halvings: int = 0) -> Effects:
    return Effects(
        {}, torch.zeros(0, dtype=torch.long), path, delta, why, halvings, 0, torch.zeros(0, dtype=torch.bool)
    )


def test_unit_notes_merge_paths_reasons_and_differences():
    notes = {}
    for found in (
        effects("replay", 1e-5, halvings=1),
        effects("hooks", np.nan, "no keys"),
        effects("replay", 3e-5, None, 2),
    ):
        noted(notes, found)
    assert notes == {"path": "hooks+replay", "why_hooks": "no keys", "replay_delta": 3e-5, "chunks_halved": 3}


def test_notes_merge_by_site_and_dropped_rows_add_up():
    def unit(sae: str, site: str, dropped: int, *found: Effects) -> UnitResult:
        notes = {"drawn": {"of": sae}, "rows_dropped": {"not finite": dropped}}
        for one in found:
            noted(notes, one)
        return UnitResult(Unit.of(sae=sae, site=site), pd.DataFrame(), notes, [])

    done = [
        unit("a", "1.resid_post", 2, effects("replay", 1e-5)),
        unit("a", "1.resid_post", 3, effects("hooks", np.nan, "too far off")),
        unit("b", "2.resid_post", 4),
    ]
    assert merged(done, "sae") == {
        "drawn": {"a": {"of": "a"}, "b": {"of": "b"}},
        "rows_dropped": {"not finite": 9},
        "path": {"1.resid_post": "hooks+replay"},
        "why_hooks": ["too far off"],
        "replay_delta": 1e-5,
        "chunks_halved": 0,
    }
    assert how_measured([("x", {})]) == {"path": {}, "why_hooks": None, "replay_delta": None, "chunks_halved": 0}
