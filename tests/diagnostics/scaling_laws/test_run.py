"""The whole question on a tiny model: what it says, keeps and refuses."""

import functools

import numpy as np
import pytest

from diagnostics.scaling_laws.fit import JOINT
from diagnostics.scaling_laws.result import ScalingLaws
from diagnostics.scaling_laws.run import sae_scaling_laws
from interventions.errors import ResultError
from tests.diagnostics.scaling_laws.grids import PROMPTS, SITE, grid
from tests.tiny import N_LAYERS, tiny_model


@functools.cache
def result() -> ScalingLaws:
    return sae_scaling_laws(tiny_model("llama"), PROMPTS, grid(), splice_prompts=12, draws=20, sink_filter=None)


def test_result_has_every_part():
    found = result()
    parts = {part: len(found.select(part=part)) for part in ("fit", "held out", "loss", "ablation", "exit")}
    assert parts["loss"] == 17 * 6 and parts["exit"] == N_LAYERS and parts["ablation"] == 1 + 2 * 4
    assert {g["form"] for g in found.select(part="held out")} >= {JOINT, "value at the next smaller width"}
    assert next(iter(found.tables())) == "Fits" and len(found.tables()) == 6
    assert found.provenance["sites"] == [str(SITE)] and found.provenance["path"] == {str(SITE): "blocks"}
    nmse = {g["sae"]: g["value"].value for g in found.select(part="loss", what="nmse")}
    fve = found.provenance["saes"].keys()
    assert nmse.keys() == set(fve) and found.left_out()
    assert any("exits" in said for said in found.own_caveats())
    assert {h.what for h in found.headlines()} >= {"gamma of the joint law"}


def test_result_roundtrip(tmp_path):
    result().write(tmp_path)
    back = ScalingLaws.load(tmp_path)
    assert back.summary().equals(result().summary()) or np.allclose(
        back.summary()["value"].astype(float), result().summary()["value"].astype(float), equal_nan=True
    )
    assert back.tokens == PROMPTS


def test_result_is_reproducible_and_exits_are_optional():
    some = {name: sae for name, sae in grid().items() if "no-auxk" not in name}
    one, two = (
        sae_scaling_laws(tiny_model("llama"), PROMPTS, some, splice_prompts=2, draws=3, exits=False) for _ in range(2)
    )
    assert one.fits.equals(two.fits) and one.frame.equals(two.frame)
    assert not one.select(part="exit") and "Early exits" not in one.tables()
    assert not [g for g in one.select(part="loss") if g["what"] == "compute"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"saes": {}}, "no SAE"),
        ({"saes": "narrow"}, "one width, 40; give two widths or more"),
        ({"draws": -1}, "draws -1"),
        ({"splice_prompts": 0}, "splice_prompts 0"),
    ],
)
def test_invalid_arguments_raise(change, message):
    given = {"saes": grid(), "draws": 0} | change
    if given["saes"] == "narrow":
        given["saes"] = {name: sae for name, sae in grid().items() if sae.d_sae == 40}
    saes = given.pop("saes")
    with pytest.raises(ResultError, match=message):
        sae_scaling_laws(tiny_model("llama"), PROMPTS, saes, **given)
