"""`scaling_laws.py` trains the grid that the library trains, and measures it on the paragraphs that were held out."""

import json

import pytest

from diagnostics.scaling_laws.result import ScalingLaws
from sae_models import load_sae


def test_a_trained_grid_can_be_read_again(script):
    run = script.finished("scaling_laws")
    found = ScalingLaws.load(run.folder)
    assert "The largest width, predicted from the others" in run.said and "Early exits" in run.said
    assert len(found.runs) == 12 + 1 + 2 * 2 and set(found.runs["condition"]) == {"base", "no AuxK", "Multi-TopK"}
    sae = load_sae(run.folder / "saes/2/standard-topk-multi-topk-d16-k2-seed1")
    assert sae.metadata["recipe"]["multi"] == 1 / 8 and sae.metadata["sites"] == ["2.resid_post"]
    trained_on = sae.metadata["text"]["name"]
    assert "without what is held out" in trained_on and "held out" in found.provenance["text"]["name"]
    again = script("scaling_laws", "--saes", run.folder / "saes", "--out", script.folder / "again")
    assert again.status == 0, again.err
    other = ScalingLaws.load(again.folder)
    assert other.frame["error"].tolist() == found.frame.set_index("sae").loc[other.runs["sae"]]["error"].tolist()
    assert not (again.folder / "saes").exists()
    # The same command goes on in its own folder, and refuses to replace the result.
    assert "holds another run" in script("scaling_laws", "--out", run.folder).error


@pytest.mark.long
def test_json_option_prints_the_document(script):
    run = script("scaling_laws", "--json", "--no-exits", "--cells", "--seeds", 0)
    assert run.status == 0, run.err
    document = json.loads(run.said)
    assert {g["part"] for g in document["summary"]} == {"fit", "held out", "loss"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--cells", "16"), "--cells 16; expected a width and a k, such as 1152x32"),
        (("--cells", "9x2"), "no cell (9, 2) in a grid"),
        (("--d-sae", 8, 8), "expected at least one, each once"),
        (("--held-out", 0), "--held-out 0 leaves no text"),
        (("--point", "resid_psot"), "no site 'resid_psot'"),
        (("--saes", "{given}"), "nor one below it; expected a folder that train_sae.py wrote"),
        (("--draws", -1), "--draws -1"),
    ],
)
def test_invalid_input_exits_2_with_one_line(script, given, no_model, words, said):
    words = [str(given / "model") if word == "{given}" else word for word in words]
    assert said in script("scaling_laws", *words).error
