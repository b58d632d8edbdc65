"""Which SAEs a grid asks for."""

import pytest

from diagnostics.scaling_laws.grid import specifications
from interventions import Site
from interventions.errors import MechdiagError
from sae_models.training.trainer import Recipe


def test_grid_has_ablations_at_one_cell():
    found = specifications(Site(2), (8, 16), (1, 2), recipe=Recipe(d_sae=4, lr=0.5), cells=((16, 2),), seeds=(3, 4))
    cell = [name for name, one in found.items() if (one.recipe.d_sae, one.recipe.k) == (16, 2)]
    assert len(found) == 4 + 1 + 2 * 2 and len(cell) == 6
    assert all(one.recipe.lr == 0.5 and one.architecture.selector == "topk" for one in found.values())
    assert found["2/standard-topk-d16-k2-seed3"].recipe.seed == 3
    assert found["2/standard-topk-no-auxk-d16-k2-seed4"].recipe.aux == 0
    assert found["2/standard-topk-multi-topk-d16-k2-seed4"].recipe.multi == 1 / 8


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cells": ((9, 2),)}, r"no cell \(9, 2\)"),
        ({"widths": (8, 8)}, "widths"),
        ({"ks": ()}, "ks"),
        ({"seeds": ()}, "seeds"),
    ],
)
def test_invalid_grids_raise(given, message):
    asked = {"widths": (8, 16), "ks": (1, 2), "recipe": Recipe(d_sae=4)} | given
    with pytest.raises(MechdiagError, match=message):
        specifications(Site(2), asked.pop("widths"), asked.pop("ks"), **asked)
