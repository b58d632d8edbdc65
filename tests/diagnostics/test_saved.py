import importlib
import json
import pkgutil

import numpy as np
import pandas as pd
import pytest

import diagnostics
from diagnostics.direction_vs_norm.result import DirectionNorm
from diagnostics.results.result import BaseResult
from diagnostics.results.stored import save_tokens
from diagnostics.saved import KINDS, saved_results, unfinished
from diagnostics.specifications.result import Specifications
from diagnostics.statistics.estimate import Estimate, FiellerInterval
from diagnostics.unit_norm.result import UnitNorm
from diagnostics.win_rate.files import from_json
from interventions.errors import ResultError
from interventions.files import write_frame, write_json
from tests.reports import measured


def without_figures(kind):
    """The kind with neither figures nor statistics, which would need more of a table than these tests have."""
    own = {"groups": [], "figures": lambda self: {}}
    return type(kind.__name__, (kind,), own)


def stored(folder, kind=UnitNorm, value=1.0):
    folder.mkdir(parents=True, exist_ok=True)
    without_figures(kind)(pd.DataFrame({"kl": [value]}), [[1, 2]], {"seed": 3}).write(folder)


def every_kind():
    for module in pkgutil.iter_modules(diagnostics.__path__):
        importlib.import_module(f"diagnostics.{module.name}")
    todo, found = [BaseResult], set()
    while todo:
        kind = todo.pop()
        todo += kind.__subclasses__()
        if kind.NAME and kind.__module__.startswith("diagnostics."):
            found.add(kind)
    return found


def test_every_kind_of_result_in_the_package_is_found():
    assert set(KINDS.values()) == every_kind()
    assert all(name == kind.NAME for name, kind in KINDS.items())


def test_results_are_named_by_their_paths(tmp_path):
    for place in ("b", "a/x", "a/y", "both"):
        stored(tmp_path / "out" / place)
    stored(tmp_path / "out/both", DirectionNorm)
    found = saved_results(tmp_path / "out")
    assert list(found) == ["a/x", "a/y", "b", "both/direction_norm", "both/unit_norm"]
    assert type(found["b"]) is UnitNorm and type(found["both/direction_norm"]) is DirectionNorm
    assert found["b"].provenance == {"seed": 3}


def test_result_in_the_folder_itself_is_named_after_it(tmp_path):
    stored(tmp_path / "mine", value=4.0)
    found = saved_results(tmp_path / "mine")
    assert list(found) == ["mine"]
    pd.testing.assert_frame_equal(found["mine"].to_frame(), pd.DataFrame({"kl": [4.0]}))


def test_work_and_hidden_folders_hold_no_results(tmp_path):
    for place in ("out", "out/units", "out/.shards-x"):
        stored(tmp_path / place)
    assert list(saved_results(tmp_path)) == ["out"]


def test_folder_without_results_names_the_known_kinds(tmp_path):
    with pytest.raises(ResultError, match=r"no folder .*nowhere"):
        saved_results(tmp_path / "nowhere")
    with pytest.raises(ResultError) as raised:
        saved_results(tmp_path)
    assert all(name in str(raised.value) for name in KINDS)


def test_unfinished_runs_are_reported(tmp_path):
    (tmp_path / "begun/units").mkdir(parents=True)
    (tmp_path / "begun/run.json").write_text("{}")
    assert unfinished(tmp_path) == ["begun"]
    with pytest.raises(ResultError, match="unfinished"):
        saved_results(tmp_path)
    stored(tmp_path / "begun")
    assert unfinished(tmp_path) == []


def test_a_result_that_lacks_a_file_is_an_error(tmp_path):
    stored(tmp_path / "out")
    (tmp_path / "out/unit_norm.parquet").unlink()
    with pytest.raises(ResultError, match=r"unit_norm\.parquet is missing"):
        saved_results(tmp_path)


def test_a_damaged_result_is_left_out_and_named(tmp_path):
    for place in ("a", "b", "c"):
        stored(tmp_path / place)
    (tmp_path / "a/unit_norm.json").write_bytes(b"[" * 100_000)
    (tmp_path / "c/unit_norm.parquet").write_bytes(b"PAR1")
    with pytest.warns(UserWarning, match=r"^(a|c) is left out: .*unit_norm\.(json|parquet)") as said:
        assert list(saved_results(tmp_path)) == ["b"]
    assert len(said) == 2
    (tmp_path / "b/tokens.npy").unlink()
    with pytest.raises(
        ResultError, match=r"a/unit_norm\.json is damaged.*tokens\.npy is missing.*c/unit_norm\.parquet"
    ):
        saved_results(tmp_path)


@pytest.mark.filterwarnings("ignore:an interval from")
def test_a_result_without_digests_that_lacks_a_column_is_damaged(tmp_path):
    measured().write(tmp_path / "sound")
    write_frame(tmp_path / "unit_norm.parquet", measured().frame.drop(columns="kl"))
    save_tokens(tmp_path / "tokens.npy", measured().tokens)
    write_json(tmp_path / "unit_norm.json", measured().as_dict())
    with pytest.warns(UserWarning, match="it is not what a unit_norm result holds"):
        assert list(saved_results(tmp_path)) == ["sound"]
    write_frame(tmp_path / "unit_norm.parquet", measured().frame)
    assert len(saved_results(tmp_path)) == 2


def test_specification_curve_roundtrip(tmp_path):
    frame = pd.DataFrame({"claim": ["direction"], "model": ["trained"], "value": [2.0], "low": [1.5], "high": [2.5]})
    without_figures(Specifications)(frame, {"boolq": {"seed": 0}}).write(tmp_path)
    found = saved_results(tmp_path)[tmp_path.name]
    assert isinstance(found, Specifications) and found.provenance == {"boolq": {"seed": 0}}
    pd.testing.assert_frame_equal(found.frame, frame)
    (tmp_path / "specification.parquet").unlink()
    with pytest.raises(ResultError, match=r"specification\.parquet is missing"):
        saved_results(tmp_path)


@pytest.mark.parametrize(
    "value",
    [
        Estimate(1.0, np.nan, np.nan, np.nan, 5, 3),
        Estimate(2.0, 1.0, 4.0, 0.25, 5, 3, bound=True),
        FiellerInterval(1.0, -np.inf, np.inf, "everything", 5, 3),
        FiellerInterval(1.0, -np.inf, -2.0, "exclusive", 5, 3),
        FiellerInterval(1.0, -3.0, 2.0, "exclusive", 5, 3),
        FiellerInterval(np.nan, np.nan, np.nan, "none", 5, 3),
        FiellerInterval(1.0, 0.5, 2.0, "bounded", 5, 3),
    ],
)
def test_numbers_roundtrip_through_json(value):
    back = from_json(type(value), json.loads(json.dumps(value.as_dict(), allow_nan=False)))
    for name in value.__dataclass_fields__:
        np.testing.assert_equal(getattr(back, name), getattr(value, name))


def test_nested_types_are_read_from_json():
    assert from_json(tuple[float, ...], [1.0, None, 2.0])[0::2] == (1.0, 2.0)
    assert from_json(dict[str, Estimate | None], {"a": None}) == {"a": None}
    assert from_json(tuple[str, str], ["a", "b"]) == ("a", "b")
