import sys
import warnings
from types import SimpleNamespace

import pytest
import tqdm as bars

from interventions.progress import Progress, followed, in_notebook


@pytest.fixture
def notebook(monkeypatch):
    """This process as the kernel of a notebook without ipywidgets."""
    shell = SimpleNamespace(kernel=object(), config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))


def test_progress_counts_rows_and_is_silent_without_any(capsys):
    with Progress("patching") as progress:
        pass
    assert capsys.readouterr().err == ""
    with Progress("patching") as progress:
        progress(3, 10)
        progress(7, 10)
        assert (progress.bar.n, progress.bar.total) == (10, 10)
    said = capsys.readouterr().err
    assert "patching" in said
    assert "10.0/10.0" in said


def test_resumed_rows_do_not_count_towards_the_speed(capsys):
    with Progress("patching") as progress:
        progress.initial(60, 100)
        assert (progress.bar.n, progress.bar.total, progress.bar.initial) == (60, 100, 60)
        progress(10, 100)
        # Ten rows in ten seconds: thirty seconds are left.
        facts = {**progress.bar.format_dict, "elapsed": 10.0, "rate": None}
        said = progress.bar.format_meter(**facts)
        assert "70.0/100" in said
        assert "00:10<00:30" in said
        progress.initial(5, 100)
        assert (progress.bar.n, progress.bar.initial) == (75, 65)
    assert "75.0/100" in capsys.readouterr().err


def test_an_interruption_closes_the_bar():
    with pytest.raises(KeyboardInterrupt), followed(True, "patching") as progress:
        progress(3, 10)
        bar = progress.bar
        raise KeyboardInterrupt
    assert bar not in bars.tqdm._instances
    assert bar.n == 3


def test_progress_functions_are_called_directly():
    seen = []
    with followed(lambda n, total: seen.append((n, total)), "patching") as progress:
        progress(3, 10)
    assert seen == [(3, 10)]


@pytest.mark.parametrize("asked", [None, False])
def test_no_bar_in_a_terminal(asked):
    assert not in_notebook()
    with followed(asked, "patching") as progress:
        assert progress is None


def test_notebooks_show_a_bar_unless_it_is_turned_off(notebook):
    assert in_notebook()
    with followed(None, "patching") as progress:
        assert isinstance(progress, Progress)
    with followed(False, "patching") as progress:
        assert progress is None


def test_without_ipywidgets_the_bar_is_text_without_a_warning(notebook, monkeypatch, capsys):
    for name in [name for name in sys.modules if name in ("tqdm.auto", "tqdm.autonotebook", "tqdm.notebook")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    monkeypatch.setattr(bars, "auto", None, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with followed(None, "patching") as progress:
            progress(10, 10)
    assert "10.0/10.0" in capsys.readouterr().err
