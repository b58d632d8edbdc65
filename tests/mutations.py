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
        "interventions/attention.py",
        "outside |= key <= self.position[:, :, None] - window",
        "outside |= key < self.position[:, :, None] - window",
        ("tests/interventions/test_replay.py",),
    ),
    Mutation(
        "all tokens of a branch have the position of its first",
        "interventions/replay.py",
        "return self.start[self.row] + self.place",
        "return self.start[self.row]",
        ("tests/interventions/test_replay.py",),
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
        "integrated gradients start at 0 whatever the baseline",
        "interventions/attribution.py",
        "vectors=b + t * (x - b)",
        "vectors=t * x",
        ("tests/interventions/test_attribution.py",),
    ),
    Mutation(
        "the direct effect adds the edited vector instead of the change",
        "interventions/chunks.py",
        "delta = (vectors - rows.clean_at_site(chunk))[edit]",
        "delta = vectors[edit]",
        ("tests/interventions/test_effects.py",),
    ),
    Mutation(
        "the threshold follows the mean activation instead of the weakest",
        "sae_models/training.py",
        "weakest = strength.min()",
        "weakest = strength.mean()",
        ("tests/sae_models/test_training.py",),
    ),
    Mutation(
        "decoder columns instead of rows are normalised",
        "sae_models/training.py",
        "W_dec /= W_dec.norm(dim=-1",
        "W_dec /= W_dec.norm(dim=0",
        ("tests/sae_models/test_training.py",),
    ),
    Mutation(
        "latents are dead after so many steps instead of tokens",
        "sae_models/training.py",
        "torch.where(fired, 0, self.silent_for + rows)",
        "torch.where(fired, 0, self.silent_for + 1)",
        ("tests/sae_models/test_training.py",),
    ),
    Mutation(
        "training does not subtract b_dec",
        "sae_models/objective.py",
        "x_c = target - sae.b_dec if sae.subtract_b_dec else target",
        "x_c = target",
        (
            "tests/sae_models/test_objective.py",
            "tests/sae_models/test_training.py",
        ),
    ),
    Mutation(
        "the AuxK loss trains the reconstruction too",
        "sae_models/objective.py",
        "error = done.error.detach()",
        "error = done.error",
        ("tests/sae_models/test_objective.py",),
    ),
    Mutation(
        "a clamp of a padded set moves latent 0",
        "sae_models/edits.py",
        "(z.masked_fill(index < 0, 0)[..., None, :]",
        "(z[..., None, :]",
        ("tests/sae_models/test_edits.py",),
    ),
    Mutation(
        "layer norm divides by the population's standard deviation",
        "sae_models/normalise.py",
        "std = centred.std(dim=-1, keepdim=True)",
        "std = centred.std(dim=-1, keepdim=True, correction=0)",
        ("tests/sae_models/test_normalise.py",),
    ),
    Mutation(
        "one degree of freedom too many",
        "diagnostics/statistics.py",
        "return float(min(p.n_prompts, p.n_units) - 1)",
        "return float(min(p.n_prompts, p.n_units))",
        ("tests/diagnostics/test_statistics.py",),
    ),
    Mutation(
        "the jackknife counts the variance of pairs twice",
        "diagnostics/statistics.py",
        "np.sqrt(max(v - v_pair, v_pair))",
        "np.sqrt(v)",
        ("tests/diagnostics/test_statistics.py",),
    ),
    Mutation(
        "a censored ratio counts as its lower bound",
        "diagnostics/statistics.py",
        "ratio = np.where(censored, np.inf, least)",
        "ratio = least",
        ("tests/diagnostics/test_statistics.py",),
    ),
    Mutation(
        "sinks are found by the mean norm instead of the median",
        "diagnostics/sampling.py",
        "size > sink_filter * np.median(size[known])",
        "size > sink_filter * np.mean(size[known])",
        ("tests/diagnostics/test_sampling.py",),
    ),
    Mutation(
        "position 1 is left out instead of position 0",
        "diagnostics/sampling.py",
        "(np.arange(special.shape[1]) == 0)",
        "(np.arange(special.shape[1]) == 1)",
        ("tests/diagnostics/test_sampling.py",),
    ),
    Mutation(
        "a tie counts as a win",
        "diagnostics/wins.py",
        "cells.latent[chosen], margin[0] > 0",
        "cells.latent[chosen], margin[0] >= 0",
        ("tests/diagnostics/test_wins.py",),
    ),
    Mutation(
        "the win rate of the placebo minus that of the edit",
        "diagnostics/wins.py",
        "np.where(edit == 0, weight, np.where(own, -weight, 0.0))",
        "np.where(edit == 0, -weight, np.where(own, weight, 0.0))",
        ("tests/diagnostics/test_wins.py",),
    ),
    Mutation(
        "the rise at the peak has the wrong sign",
        "diagnostics/steering_summary.py",
        "table[peak] - table[other]",
        "table[other] - table[peak]",
        ("tests/diagnostics/test_steering_summary.py",),
    ),
    Mutation(
        "the placebo of the direction patch has the dose of the full patch",
        "diagnostics/direction_patching.py",
        "matched_placebo(x, swap_direction(x, a), isotropic if",
        "matched_placebo(x, a, isotropic if",
        ("tests/diagnostics/test_direction_patching.py",),
    ),
    Mutation(
        "the direction patch is not compared with its placebo",
        "diagnostics/direction_summary.py",
        '    ("direction", "placebo_token"),\n',
        "",
        ("tests/diagnostics/test_direction_summary.py",),
    ),
    Mutation(
        "placebos also where no latent is removed",
        "diagnostics/projection_design.py",
        '("latent", *(PLACEBOS if reference == "latent" else ()))',
        '("latent",)',
        ("tests/diagnostics/test_projections.py",),
    ),
    Mutation(
        "a group of texts is split between training and held-out texts",
        "diagnostics/probing_tasks.py",
        "own = list(texts if groups is None else groups)",
        "own = list(texts)",
        ("tests/diagnostics/test_probing_tasks.py",),
    ),
    Mutation(
        "sparse probing selects latents on held-out texts",
        "diagnostics/latent_probes.py",
        "(ranked(train, task.y_train), task.y_train)",
        "(ranked(test, task.y_test), task.y_train)",
        (
            "tests/diagnostics/test_latent_probes.py",
            "tests/diagnostics/test_sparse_probing.py",
        ),
    ),
    Mutation(
        "a resumed run returns units in the order they were computed",
        "diagnostics/units.py",
        "return [done[key] for key in keyed]",
        "return list(done.values())",
        ("tests/diagnostics/test_units.py",),
    ),
    Mutation(
        "the last prompts that do not fill a shard are skipped",
        "diagnostics/study.py",
        "n_shards = -(-len(self.prompts.tokens) // SHARD)",
        "n_shards = max(1, len(self.prompts.tokens) // SHARD)",
        ("tests/diagnostics/test_study.py",),
    ),
    Mutation(
        "dropped rows are counted in the last unit only",
        "diagnostics/study.py",
        "counts[reason] = counts.get(reason, 0) + n",
        "counts[reason] = n",
        ("tests/diagnostics/test_study.py",),
    ),
    Mutation(
        "the norm exponent of centred scores uses the uncentred norm",
        "diagnostics/norm_exponent.py",
        '"_centred" * centred, "norm" + "_centred" * centred',
        '"_centred" * centred, "norm"',
        ("tests/diagnostics/test_norm_exponent.py",),
    ),
    Mutation(
        "latents of opposite activations match",
        "diagnostics/dictionary_matching.py",
        "& able[1], r * cos, 0.0)",
        "& able[1], np.abs(r * cos), 0.0)",
        ("tests/diagnostics/test_dictionary_matching.py",),
    ),
    Mutation(
        "logit changes are centred on the mean instead of the median",
        "diagnostics/effect_sparsity.py",
        "change.median(dim=-1, keepdim=True).values",
        "change.mean(dim=-1, keepdim=True)",
        ("tests/diagnostics/test_effect_sparsity.py",),
    ),
    Mutation(
        "the Fisher score squares the mean slope instead of averaging squares",
        "diagnostics/atlas_scores.py",
        "slopes.square().mean(0) / 2",
        "slopes.mean(0).square() / 2",
        ("tests/diagnostics/test_atlas_scores.py",),
    ),
    Mutation(
        "t of all groups instead of the smaller side's",
        "diagnostics/ablation_curves.py",
        "stats.t.ppf(0.975, few - 1)",
        "stats.t.ppf(0.975, len(without) - 1)",
        ("tests/diagnostics/test_ablation_summary.py",),
    ),
    Mutation(
        "target tokens are chosen on the half that is measured",
        "diagnostics/concepts.py",
        "own, others = (texts.side(some, True) for",
        "own, others = (texts.side(some, False) for",
        ("tests/diagnostics/test_concepts.py",),
    ),
    Mutation(
        "dose matching prefers smaller doses",
        "diagnostics/ablation_arms.py",
        "np.abs(level - np.log(max(doses[latent], 1e-12)))",
        "level - np.log(max(doses[latent], 1e-12))",
        ("tests/diagnostics/test_ablation_arms.py",),
    ),
    Mutation(
        "variance explained is about a fixed centre",
        "diagnostics/sae_measures.py",
        " - keep @ gram @ keep / sums.n[keep].sum()",
        "",
        ("tests/diagnostics/test_sae_evaluation.py",),
    ),
    Mutation(
        "paragraphs that begin alike are split between training and held-out text",
        "diagnostics/held_out.py",
        "text.lower()))[:_HEAD]",
        "text.lower()))",
        ("tests/diagnostics/test_held_out.py",),
    ),
    Mutation(
        "class probes are fitted on the texts that judge them too",
        "diagnostics/targeted_probes.py",
        "fitted(pooled[ranking], label[ranking] == name",
        "fitted(pooled, label == name",
        ("tests/diagnostics/test_targeted_probes.py",),
    ),
    Mutation(
        "the rotation control moves x by its norm",
        "diagnostics/unit_norm.py",
        "rotate_by_distance(x, towards, (norm(x) - 1).abs())",
        "rotate_by_distance(x, towards, norm(x))",
        ("tests/diagnostics/test_unit_norm.py",),
    ),
    Mutation(
        "the token weight of a stratum is inverted",
        "diagnostics/latent_sampling.py",
        "np.repeat(size / np.maximum(taken, 1), size)",
        "np.repeat(taken / size, size)",
        ("tests/diagnostics/test_latent_sampling.py",),
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
