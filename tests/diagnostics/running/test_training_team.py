"""SAEs trained by workers are those of one process, byte for byte; a run whose worker is killed goes on from its checkpoint."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diagnostics.running.workers import workers
from interventions.errors import ResultError
from sae_models.architectures import named
from sae_models.errors import SAEError
from sae_models.training.recipe import Recipe
from sae_models.training.runs import Job, train
from tests.sae_models.built import inputs

pytestmark = pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")  # Ray's own
RECIPE = Recipe(d_sae=20, k=3, lr=0.01, dead_window=0.1)
JOBS = [
    Job("15/standard", "late", named("standard"), RECIPE, "m", "blocks.15.hook_resid_post"),
    Job("15/signed", "late", named("signed-gated"), replace(RECIPE, d_sae=30)),
    Job("7/topk", "early", named("aligned:topk"), replace(RECIPE, seed=1)),
]
STEPS = 12


def stream(at_step=None, do=lambda: None):
    for n in range(STEPS):
        if n == at_step:
            do()
        yield {name: inputs(16, seed=1000 * i + n, dtype=torch.float32) for i, name in enumerate(("early", "late"))}


def trained(folder: Path, batches, team=None, jobs=JOBS):
    settings = {"steps": STEPS, "log_every": 3, "checkpoint_every": 4, "keep_every": 6}
    return train(batches, jobs, folder=folder, team=team, **settings)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_workers_match_one_process_and_killed_runs_resume(tmp_path):
    alone = trained(tmp_path / "alone", stream())
    with workers(2) as pool:
        together = trained(tmp_path / "together", stream(), pool.team())
        assert len(pool.pids()) == 2
        with pytest.raises(SAEError, match="the loss is nan at step 3"):
            broken = ({name: x * torch.nan if n == 1 else x for name, x in b.items()} for n, b in enumerate(stream()))
            trained(tmp_path / "broken", broken, pool.team())
        with pytest.raises(ResultError, match=r"a worker that trained SAEs ended .* run the same command again"):
            trained(tmp_path / "killed", stream(9, lambda: os.kill(pool.pids()[0], signal.SIGKILL)), pool.team())
    assert (tmp_path / "killed" / "checkpoint.pt").exists()
    trained(tmp_path / "killed", stream())  # one process goes on where workers stopped
    expected = contents(tmp_path / "alone")
    assert contents(tmp_path / "together") == contents(tmp_path / "killed") == expected
    assert "15/signed/tokens-96/sae_weights.safetensors" in expected
    x = inputs(dtype=torch.float32)
    assert all(torch.equal(together[job.name](x), alone[job.name](x)) for job in JOBS)
