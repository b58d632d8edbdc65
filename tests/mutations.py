"""Faults planted one at a time in a copy of the checkout: the tests named beside each must fail.

`python -m tests.mutations` exits 1 when a fault is not caught. `--only NAME` plants one fault, `--jobs N` plants several at
once, `--fails N` goes on until N tests have failed and names them all.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import beartype  # noqa: F401  (before torch and transformers, as in conftest)
import pandas  # noqa: F401
import pytest
import scipy.stats  # noqa: F401
import torch
from transformers import AutoModelForCausalLM  # noqa: F401

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mutation:
    """A fault that changes a number and raises nothing by itself."""

    name: str
    """what is wrong"""
    file: str
    old: str
    """occurs exactly once in the file"""
    new: str
    tests: tuple[str, ...]
    """files or folders of which at least one test must fail"""


MUTATIONS = (
    Mutation(
        "the sliding window is one key too wide",
        "interventions/replaying/attention.py",
        "outside |= key <= self.position[:, :, None] - window",
        "outside |= key < self.position[:, :, None] - window",
        ("tests/interventions/replaying/test_replay.py",),
    ),
    Mutation(
        "all tokens of a branch have the position of its first",
        "interventions/replaying/replay.py",
        "return self.start[self.row] + self.place",
        "return self.start[self.row]",
        ("tests/interventions/replaying/test_replay.py",),
    ),
    Mutation(
        "the kernel's KL lacks tokens whose p underflows",
        "interventions/fused.py",
        "growth += tl.where(d > LARGE, far, near)",
        "growth += near",
        ("tests/interventions/test_fused.py",),
    ),
    Mutation(
        "KL without its logarithm",
        "interventions/metrics.py",
        "kl = torch.log1p(_dot(p, torch.expm1(d).sub_(d)))",
        "kl = _dot(p, torch.expm1(d).sub_(d))",
        ("tests/interventions/test_metrics.py",),
    ),
    Mutation(
        "placebo noise is uniform instead of Gaussian",
        "interventions/edits.py",
        "return torch.randn(x.shape",
        "return torch.rand(x.shape",
        ("tests/interventions/test_edits.py",),
    ),
    Mutation(
        "a rotation moves along the arc instead of the chord",
        "interventions/edits.py",
        "2 * torch.asin(chord / (2 * norm(x).double().squeeze(-1)))",
        "chord / norm(x).double().squeeze(-1)",
        ("tests/interventions/test_edits.py",),
    ),
    Mutation(
        "the threshold follows the mean activation instead of the weakest",
        "sae_models/training/trainer.py",
        "weakest = strength.min()",
        "weakest = strength.mean()",
        ("tests/sae_models/training/test_trainer.py",),
    ),
    Mutation(
        "decoder columns instead of rows are normalised",
        "sae_models/training/trainer.py",
        "W_dec /= W_dec.norm(dim=-1",
        "W_dec /= W_dec.norm(dim=0",
        ("tests/sae_models/training/test_trainer.py",),
    ),
    Mutation(
        "training does not subtract b_dec",
        "sae_models/training/objective.py",
        "x_c = target - sae.b_dec if sae.subtract_b_dec else target",
        "x_c = target",
        ("tests/sae_models/training/test_objective.py",),
    ),
    Mutation(
        "the AuxK loss trains the reconstruction too",
        "sae_models/training/objective.py",
        "error = done.error.detach()",
        "error = done.error",
        ("tests/sae_models/training/test_objective.py",),
    ),
    Mutation(
        "a clamp of a padded set moves latent 0",
        "sae_models/edits.py",
        "(z.masked_fill(index < 0, 0)[..., None, :]",
        "(z[..., None, :]",
        ("tests/sae_models/test_edits.py",),
    ),
    Mutation(
        "one degree of freedom too many",
        "diagnostics/statistics/jackknife.py",
        "return float(min(p.n_effective, p.n_units) - 1)",
        "return float(min(p.n_effective, p.n_units))",
        ("tests/diagnostics/statistics/test_jackknife.py",),
    ),
    Mutation(
        "the jackknife counts the variance of pairs twice",
        "diagnostics/statistics/jackknife.py",
        "np.sqrt(max(v - v_pair, v_pair))",
        "np.sqrt(v)",
        ("tests/diagnostics/statistics/test_jackknife.py",),
    ),
    Mutation(
        "sinks are found by the mean norm instead of the median",
        "diagnostics/sampling/tokens.py",
        "size > sink_filter * np.median(size[known])",
        "size > sink_filter * np.mean(size[known])",
        ("tests/diagnostics/sampling/test_tokens.py",),
    ),
    Mutation(
        "position 1 is left out instead of position 0",
        "diagnostics/sampling/tokens.py",
        "(np.arange(special.shape[1]) == 0)",
        "(np.arange(special.shape[1]) == 1)",
        ("tests/diagnostics/sampling/test_tokens.py",),
    ),
    Mutation(
        "an equal score wins",
        "diagnostics/win_rate/simpson.py",
        "cosine - inner > (_TIE - 1) * np.abs(inner)",
        "cosine - inner >= 0",
        ("tests/diagnostics/win_rate/test_simpson.py",),
    ),
    Mutation(
        "the rise at the peak has the wrong sign",
        "diagnostics/latent_edits/steering_summary.py",
        "table[peak] - table[other]",
        "table[other] - table[peak]",
        ("tests/diagnostics/latent_edits/test_steering_summary.py",),
    ),
    Mutation(
        "the placebo of the direction patch has the dose of the full patch",
        "diagnostics/direction_vs_norm/design.py",
        "matched_placebo(x, swap_direction(x, a), isotropic if",
        "matched_placebo(x, a, isotropic if",
        ("tests/diagnostics/direction_vs_norm/test_run.py",),
    ),
    Mutation(
        "the direction patch is not compared with its placebo",
        "diagnostics/direction_vs_norm/summary.py",
        '    ("direction", "placebo_token"),\n',
        "",
        ("tests/diagnostics/direction_vs_norm/test_summary.py",),
    ),
    Mutation(
        "a group of texts is split between training and held-out texts",
        "diagnostics/sparse_probing/tasks.py",
        "own = list(texts if groups is None else groups)",
        "own = list(texts)",
        ("tests/diagnostics/sparse_probing/test_tasks.py",),
    ),
    Mutation(
        "sparse probing selects latents on held-out texts",
        "diagnostics/sparse_probing/probes.py",
        '"selected": ranked(train, task.y_train)',
        '"selected": ranked(test, task.y_test)',
        ("tests/diagnostics/sparse_probing/test_probes.py",),
    ),
    Mutation(
        "labels are shuffled between texts of different groups",
        "diagnostics/sparse_probing/tasks.py",
        "members.setdefault(own[i], [])",
        "members.setdefault(str(i), [])",
        ("tests/diagnostics/sparse_probing/test_draws.py",),
    ),
    Mutation(
        "the interval with refits takes overlapping splits for independent",
        "diagnostics/sparse_probing/summary.py",
        "(1 / m + draws.test_ratio)",
        "(1 / m)",
        ("tests/diagnostics/sparse_probing/test_draws.py",),
    ),
    Mutation(
        "the error along a decoder row keeps the score's factor of the norm",
        "diagnostics/dictionary_comparison/gradients.py",
        "return sensitivity, gradient, by_latent,",
        "return sensitivity, gradient, gradient,",
        ("tests/diagnostics/dictionary_comparison/test_gradients.py",),
    ),
    Mutation(
        "a resumed run returns units in the order they were computed",
        "diagnostics/running/units.py",
        "return [done[key] for key in keyed]",
        "return list(done.values())",
        ("tests/diagnostics/running/test_units.py",),
    ),
    Mutation(
        "dropped rows are counted in the last unit only",
        "diagnostics/running/notes.py",
        "total.update(some)",
        "total = Counter(some)",
        ("tests/diagnostics/running/test_notes.py",),
    ),
    Mutation(
        "the norm exponent of centred scores uses the uncentred norm",
        "diagnostics/projections/norm_exponent.py",
        '"_centred" * centred, "norm" + "_centred" * centred',
        '"_centred" * centred, "norm"',
        ("tests/diagnostics/projections/test_norm_exponent.py",),
    ),
    Mutation(
        "latents of opposite signs match",
        "diagnostics/dictionary_comparison/matching.py",
        "& able[1], r * cos, 0.0)",
        "& able[1], np.abs(r * cos), 0.0)",
        ("tests/diagnostics/dictionary_comparison/test_matching.py",),
    ),
    Mutation(
        "every head is the first",
        "interventions/models/inside.py",
        "return torch.arange(site.head * d_head, (site.head + 1) * d_head)",
        "return torch.arange(d_head)",
        ("tests/interventions/test_inside.py",),
    ),
    Mutation(
        "logits of a few tokens: those of one side alone",
        "interventions/metrics.py",
        "lists = [_as_ids(given) for given in self._ids()]",
        "lists = [_as_ids(given) for given in self._ids()[:1]]",
        ("tests/interventions/test_effects.py",),
    ),
    Mutation(
        "controls of edges write with norm 1, whatever the sender writes",
        "diagnostics/edges/sweep.py",
        "torch.where(far > 0, far * unit(other), 0.0)",
        "torch.where(far > 0, unit(other), 0.0)",
        ("tests/diagnostics/edges/test_edge_patching.py",),
    ),
)


def mutated(mutation: Mutation) -> str:
    """The source with the fault. Raises `ValueError` unless the old text occurs exactly once."""
    source = (ROOT / mutation.file).read_text()
    if (n := source.count(mutation.old)) != 1:
        raise ValueError(f"{mutation.name}: {mutation.old!r} occurs {n} times in {mutation.file}; expected once")
    return source.replace(mutation.old, mutation.new)


class Failed:
    """A pytest plugin that collects the names of failing tests."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.names.append(report.nodeid)


def failing(tests: tuple[str, ...], mutation: Mutation | None, most: int) -> list[str]:
    """The names of the tests that fail in a copy of the checkout, with the fault planted; `most` of them at most.

    To be run in a process of its own. Raises `RuntimeError` when the tests do not run: a fault that stops an import proves
    nothing.
    """
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place).resolve()
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).exists():  # not deleted since the last commit
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, folder / name)
        if mutation is not None:
            (folder / mutation.file).write_text(mutated(mutation))
        os.chdir(folder)
        os.environ["PYTHONPATH"] = str(folder)
        sys.path[:] = [str(folder), *(path for path in sys.path if path not in ("", str(ROOT)))]
        for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
            del sys.modules[name]
        words = ["-q", "--tb=no", "--assert=plain", "-p", "no:cacheprovider", f"--maxfail={most}", *tests]
        failed, said = Failed(), io.StringIO()
        with contextlib.redirect_stdout(said):
            status = pytest.main(words, plugins=[failed])
        os.chdir(ROOT)
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest {' '.join(tests)} exits {status}:\n{said.getvalue()}")
    return list(dict.fromkeys(failed.names))


def main() -> None:
    """See the module."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", metavar="NAME", choices=[m.name for m in MUTATIONS], help="default: all faults")
    parser.add_argument("--jobs", type=int, default=1, help="faults at once")
    parser.add_argument("--fails", type=int, default=1, help="failing tests to find and name")
    given = parser.parse_args()
    chosen = [m for m in MUTATIONS if given.only in (None, m.name)]
    for mutation in chosen:
        mutated(mutation)
    tests = tuple(sorted({name for m in chosen for name in m.tests}))
    missed = 0
    tasks = [(tests, None, 1), *((m.tests, m, given.fails) for m in chosen)]
    # Forked from a process that has imported the libraries, one for each fault: these imports cost more than the tests.
    with multiprocessing.get_context("fork").Pool(given.jobs, maxtasksperchild=1) as pool:
        sound, *faulty = [pool.apply_async(failing, task) for task in tasks]
        for mutation, result in zip(chosen, faulty, strict=True):
            found = result.get()
            missed += not found
            print(f"{'caught' if found else 'NOT CAUGHT'}: {mutation.name}", *found, sep="\n    ", flush=True)
        if broken := sound.get():
            print("These tests fail without a fault:", *broken, sep="\n    ")
    print(f"{len(chosen) - missed} of {len(chosen)} faults caught")
    raise SystemExit(bool(missed or broken))


if __name__ == "__main__":
    main()
