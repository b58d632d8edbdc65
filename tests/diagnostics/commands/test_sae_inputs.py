"""How commands name SAEs: kinds of the zoo at layers, or what `load_sae` takes."""

import pytest

from diagnostics.commands.sae_inputs import SAERunOptions, named_saes, sae_paths
from interventions.errors import MechdiagError
from interventions.models.names import LAYERNORM_MODEL
from sae_models.errors import CheckpointError


def test_kinds_become_paths_in_the_zoo_and_paths_stay(tmp_path):
    (tmp_path / "cosine").mkdir()
    given = ("cosine", "results/7/standard", "hf:a/b/c", str(tmp_path / "cosine"))
    expected = ("m/7/cosine", "m/15/cosine", "results/7/standard", "hf:a/b/c", str(tmp_path / "cosine"))
    assert sae_paths(given, (7, 15), "m") == expected
    assert sae_paths(["cosine"], [7], LAYERNORM_MODEL) == ("smollm2-135m/7/cosine",)


def test_packaged_saes_get_distinct_names():
    saes = named_saes(["standard", "cosine"], [7, 15], "smollm2-135m", "cpu")
    assert list(saes) == ["7/standard", "15/standard", "7/cosine", "15/cosine"]
    assert saes["15/cosine"].hook_name == "blocks.15.hook_resid_post"
    with pytest.raises(CheckpointError, match="no SAE 'smollm2-135m/99/standard'"):
        named_saes(["standard"], [99], "smollm2-135m", "cpu")


def test_no_sae_is_an_error(tmp_path):
    with pytest.raises(MechdiagError, match="name at least one"):
        SAERunOptions(out=tmp_path, saes=()).check(())
