"""Effects formed where a remote model runs equal those of full forward passes here."""

import nnsight.ndif
import numpy as np
import pytest
import torch

from interventions import ModelError, Put, Reference, ReplayError, Site, measure, measure_joint, record, wrap
from interventions.metrics import METRICS, LogitDifference
from tests.tiny import D_MODEL, N_LAYERS, far_away, fresh, prompts, several

ASKED = (*METRICS, "kl_direct")
VECTORS = torch.randn(24, D_MODEL, generator=torch.Generator().manual_seed(0))
LENGTHS = (9, 12, 9, 7, 12, 12, 1)


@pytest.fixture(autouse=True)
def _package_is_not_sent(monkeypatch):
    monkeypatch.setattr(nnsight.ndif, "pull_env", lambda *_, **__: None)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def recordings(request, tmp_path_factory):
    """Of a model here, and of the same far away."""
    hf, tokens = fresh(request.param), prompts(LENGTHS)
    there = wrap(far_away(hf, tmp_path_factory.mktemp("model")), remote="local")
    return [record(model, tokens, [Site(2), Site(0, "resid_pre"), Site(N_LAYERS - 1)]) for model in (hf, there)]


def rows():
    """Tokens of all prompts, in no order."""
    every = [(prompt, position) for prompt, n in enumerate(LENGTHS) for position in range(n)]
    chosen = np.random.default_rng(0).permutation(len(every))[: len(VECTORS)]
    return torch.tensor(every)[chosen].T


def assert_equal(found, expected):
    assert found.path == expected.path == "hooks" and torch.equal(found.position, expected.position)
    assert torch.equal(found.finite, expected.finite) and found.values.keys() == expected.values.keys()
    for name, value in expected.values.items():
        assert found[name].dtype == value.dtype
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5, equal_nan=True, msg=name)


@pytest.mark.parametrize(
    ("site", "horizon"),
    [(Site(2), 3), (Site(0, "resid_pre"), "last"), (Site(N_LAYERS - 1), 1), (Site(N_LAYERS - 1), "last")],
)
def test_effects_equal_local_ones(recordings, site, horizon):
    vectors = VECTORS.clone()
    vectors[3] = torch.nan
    for reference in (None, Reference(VECTORS[:4], torch.arange(len(VECTORS)) % 4)):
        mine, theirs = (
            measure(
                r,
                site,
                *rows(),
                vectors,
                metrics=ASKED,
                path="hooks",
                horizon=horizon,
                reference=reference,
                nonfinite="count",
            )
            for r in recordings
        )
        assert_equal(theirs, mine)
        assert mine.n_nonfinite
        if site.layer < N_LAYERS - 1 or horizon != "last":  # a change after the last block stays at its token
            assert bool((mine["kl"].nan_to_num() > 0.01).any())


def test_small_effects_equal_local_ones(recordings):
    here, there = recordings
    small = here.at(Site(2), *rows()) * (1 + 1e-4)
    mine, theirs = (measure(r, Site(2), *rows(), small, path="hooks")["kl"] for r in (here, there))
    assert float(mine.median()) < 1e-5
    torch.testing.assert_close(theirs, mine, rtol=0.05, atol=1e-12)


def test_rows_of_several_edits_and_sites_equal_local_ones(recordings):
    prompt, position = several()
    keep = (prompt < len(LENGTHS)) & (
        position < torch.tensor(LENGTHS)[prompt.clamp(max=len(LENGTHS) - 1)][:, None]
    ).all(1)
    prompt, position = prompt[keep], position[keep]
    vectors = torch.randn(*position.shape, D_MODEL, generator=torch.Generator().manual_seed(1))
    mine, theirs = (
        measure(r, Site(2), prompt, position, vectors, metrics=ASKED, path="hooks", horizon="last") for r in recordings
    )
    assert_equal(theirs, mine)
    row, place = torch.arange(3), torch.tensor([4, 5, 6])
    puts = [Put(Site(2), row, place, VECTORS[:3]), Put(Site(N_LAYERS - 1), row, place, VECTORS[3:6])]
    mine, theirs = (measure_joint(r, torch.tensor([0, 1, 2]), puts, path="hooks") for r in recordings)
    assert_equal(theirs, mine)


def test_replay_raises_or_falls_back_with_one_warning(recordings):
    there, at = recordings[1], rows()
    there.model.warned.clear()
    with pytest.raises(
        ReplayError, match="not exact here: the model runs remotely, and its keys and values stay there"
    ):
        measure(there, Site(2), *at, VECTORS, path="replay")
    with pytest.warns(UserWarning, match="full forward passes .* the model runs remotely") as warned:
        first = measure(there, Site(2), *at, VECTORS)
        again = measure(there, Site(2), *at, VECTORS)
    assert len(warned) == 1 and first.path == again.path == "hooks" and "remotely" in (again.why_hooks or "")


def test_metrics_that_read_logits_raise(recordings):
    with pytest.raises(ModelError, match="logit_difference reads logits, which do not travel; known: kl, js"):
        measure(recordings[1], Site(2), *rows(), VECTORS, metrics=(LogitDifference([1], [2]),), path="hooks")


def test_each_chunk_is_one_remote_job(recordings, monkeypatch):
    there, jobs = recordings[1], []
    session = type(there.model.handle).session
    monkeypatch.setattr(
        type(there.model.handle), "session", lambda self, **how: jobs.append(how["remote"]) or session(self, **how)
    )
    measure(there, Site(2), *rows(), VECTORS, path="hooks", horizon="last")
    assert jobs == ["local"]
