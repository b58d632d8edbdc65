"""Workers and parts give the tables, notes and files that one process gives; what differs between them is refused on one line."""

import os
import signal
import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from diagnostics import activation_patching, causal_atlas, dictionary_effects, direction_norm
from diagnostics.running import ray_pool, recordings
from diagnostics.running.place import Place, parts_of, placed_at
from diagnostics.running.ray_pool import Worker, facts
from diagnostics.running.units import PartDone, Unit, Units, run_units
from diagnostics.running.workers import workers
from interventions import Site, load_model, record
from interventions.errors import ModelError, ResultError
from interventions.models.wrapping import wrap
from interventions.provenance import processor
from sae_models.architectures import build, named
from tests.diagnostics.unit_processes import IDENTITY, SHARDS, numbers
from tests.tiny import D_MODEL, fresh, prompts, tiny_model, tokenizer, traced

pytestmark = [
    pytest.mark.filterwarnings("ignore:an interval from .* prompts"),
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),  # Ray's own
]
PROMPTS = prompts(tuple(8 + i % 5 for i in range(140)))  # three shards
SITE = Site(2)


def _pairs():
    found = []
    for i, ids in enumerate(prompts((7,) * 40)):
        clean, corrupt = ids, [*ids[:3], 30 + (ids[3] + 7) % 60, *ids[4:]]
        right, wrong = 30 + i % 20, 60 + i % 20
        m = tiny_model("llama")(torch.tensor([clean, corrupt])).logits[:, -1, [right, wrong]] @ torch.tensor([1.0, -1])
        found.append((clean, corrupt, right, wrong) if m[0] > m[1] else (clean, corrupt, wrong, right))
    return found


@pytest.fixture(scope="module")
def calls():
    """Four diagnostics on their small runs."""
    x = record(fresh("llama"), PROMPTS[:20], [SITE]).activations[SITE].reshape(-1, D_MODEL)
    sae = build(named("standard:topk"), 48, 5, x, torch.Generator().manual_seed(1), hook_name=SITE.hook_name)
    sae = sae.requires_grad_(False)
    pairs = _pairs()
    return {
        "direction_norm": lambda **how: direction_norm(
            fresh("llama"), PROMPTS, layers=[1, 4], pairs=40, context="both", null_seeds=1, **how
        ),
        "causal_atlas": lambda **how: causal_atlas(fresh("llama"), PROMPTS[:80], sae, path_share=0.2, **how),
        "dictionary_effects": lambda **how: dictionary_effects(
            fresh("llama"), PROMPTS, sae, tokens_per_latent=300, **how
        ),
        "activation_patching": lambda **how: activation_patching(
            fresh("llama"), pairs, layers=[1, 4], sites=["z", "mlp_out"], **how
        ),
    }


@pytest.fixture(scope="module")
def alone(calls, tmp_path_factory):
    """What one process gives, and the folder it leaves."""
    folder = tmp_path_factory.mktemp("alone")
    return {name: (call(folder=folder / name), folder / name) for name, call in calls.items()}


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def same(found, folder, expected):
    whole, place = expected
    pd.testing.assert_frame_equal(found.frame, whole.frame, check_exact=True)
    assert found.provenance == whole.provenance
    assert files(folder) == files(place)


# Parts


def test_parts_keep_groups_whole_unless_there_are_too_few():
    groups = [g for g, n in (("a", 6), ("b", 2), ("c", 2), ("d", 2)) for _ in range(n)]
    assert parts_of(groups, 2) == [1] * 6 + [2] * 6
    assert parts_of(groups, 1) == [1] * 12
    assert parts_of(["a"] * 5, 3) == [1, 1, 2, 2, 3]
    for n in range(1, 30):
        for some in (groups, list(range(17)), ["a"] * 7):
            parts = parts_of(some, n)
            assert parts == sorted(parts) and parts[0] >= 1 and parts[-1] <= n
            sizes = [parts.count(i) for i in range(1, n + 1)]
            assert len(set(some)) >= n or max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("name", ["direction_norm", "causal_atlas", "dictionary_effects", "activation_patching"])
def test_joined_parts_match_one_run(name, calls, alone, tmp_path):
    for i in (2, 1, 2):
        with workers(part=(i, 3)), pytest.raises(PartDone) as kept:
            calls[name](folder=tmp_path)
        assert kept.value.code == 0 and list(kept.value.missing)[-1] == "3/3"
    with pytest.raises(ResultError, match=r"begun in parts, and part 3/3 lacks \d+ units?; run --part 3/3, then join"):
        calls[name](folder=tmp_path)
    with workers(part=(3, 3)):
        last = calls[name](folder=tmp_path)  # nothing is missing any more
    pd.testing.assert_frame_equal(last.frame, alone[name][0].frame, check_exact=True)
    same(calls[name](folder=tmp_path), tmp_path, alone[name])


def test_parts_share_a_folder_with_each_other_only(tmp_path):
    def run(fn=lambda unit, tick: (numbers(unit), {})):
        return run_units(SHARDS, tmp_path, fn, identity=IDENTITY)

    def meanwhile(unit, tick):
        (tmp_path / "units" / ".partial-of-another.parquet").touch()
        with placed_at(Place()), pytest.raises(ResultError, match="another process is working"):
            run()
        with workers(part=(2, 2)), pytest.raises(PartDone):
            run()
        assert (tmp_path / "units" / ".partial-of-another.parquet").exists()  # may be in use
        return numbers(unit), {}

    with workers(part=(1, 2)):
        assert len(run(meanwhile)) == len(SHARDS)
    with Units(tmp_path, IDENTITY), workers(part=(1, 2)), pytest.raises(ResultError, match="another process"):
        run()
    assert run() and not list(tmp_path.rglob(".partial*"))


def test_part_starts_with_its_groups_first_unit(tmp_path):
    some = [Unit.of(group=("g",), shard=i) for i in range(4)]
    asked = []
    with (
        workers(part=(2, 2)),
        pytest.raises(PartDone, match=r"part 2/2: 3 units are kept in .*; part 1/2 lacks 1 unit"),
    ):
        run_units(some, tmp_path, lambda unit, tick: (asked.append(unit["shard"]), (numbers(unit), {}))[1], identity={})
    assert asked == [0, 2, 3]


def test_parts_of_other_machines_are_refused_unless_mixed(tmp_path):
    def run(i, n, **facts):
        with workers(part=(i, n) if n else None, mixed=mixed):
            run_units(SHARDS, folder, lambda unit, tick: (numbers(unit), {}), identity=facts)

    for here, there, said in (
        ({"threads": 1, "processor": "A"}, {"threads": 2, "processor": "A"}, "threads was 1, is 2"),
        ({"threads": 1, "processor": "A"}, {"threads": 1, "processor": "B"}, 'processor was "A", is "B"'),
    ):
        folder, mixed = tmp_path / said[:4], False
        with pytest.raises(PartDone):
            run(1, 2, **here)
        for part in ((2, 2), (0, 0)):
            with pytest.raises(ResultError, match=f"another run: {said}"):
                run(*part, **there)
        folder, mixed = tmp_path / f"{said[:4]} mixed", True
        with pytest.raises(PartDone):
            run(1, 2, **here)
        run(2, 2, **there)
        run(0, 0, **there)


def test_parts_together_record_each_shard_once(tmp_path, monkeypatch):
    model, recorded, part = wrap(fresh("llama")), [], 0
    count = recordings.Recordings.of_shard
    monkeypatch.setattr(
        recordings.Recordings, "of_shard", lambda self, i: (recorded.append((part, i)), count(self, i))[1]
    )
    alone = recordings.Recordings(model, PROMPTS, [Site(1), Site(3)]).activations()
    recorded.clear()
    for part in (2, 1, 3):
        with placed_at(Place(part=(part, 3), shared=tmp_path)):
            found = recordings.Recordings(model, PROMPTS, [Site(1), Site(3)]).activations()
        for x, y in zip(found, alone, strict=True):
            assert all(torch.equal(x[site], y[site]) for site in (Site(1), Site(3)))
    assert recorded == [(2, 1), (2, 2), (2, 0)]  # its own first
    [first, *_] = sorted(tmp_path.iterdir())
    first.write_bytes(b"half")
    with placed_at(Place(part=(1, 3), shared=tmp_path)), pytest.raises(ResultError, match=r"is damaged .*remove it"):
        recordings.Recordings(model, PROMPTS, [Site(1), Site(3)]).activations()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"n": 2, "part": (1, 2)}, "a part is computed by one process"),
        ({"ray": "auto", "part": (1, 2)}, "a part is computed by one process"),
        ({"part": (3, 2)}, r"part 3/2; expected i/n with i from 1 to n"),
        ({"part": (0, 2)}, r"part 0/2; expected"),
        ({"n": 0}, "0 workers with 1 threads"),
    ],
)
def test_options_that_exclude_each_other_raise(how, said):
    with pytest.raises(ResultError, match=said), workers(**how):
        pass


def test_a_part_needs_a_folder(calls):
    with workers(part=(1, 2)), pytest.raises(ResultError, match="a part of a run needs a folder"):
        calls["activation_patching"]()


# What can be wrong before and in a worker


def test_missing_ray_or_cluster_raises(calls, monkeypatch):
    for address, said in (
        ("127.0.0.1:1", "no Ray at 127.0.0.1:1 .*ray start --head"),
        ("nonsense", "'nonsense' is no address of a Ray cluster"),
    ):
        with workers(ray=address), pytest.raises(ResultError, match=said):
            calls["activation_patching"]()
    monkeypatch.setitem(sys.modules, "ray", None)
    with workers(2), pytest.raises(ResultError, match=r"Ray, which is not installed: pip install 'mechdiag\[ray\]'"):
        calls["activation_patching"]()


def test_worker_rejects_other_code_versions_or_machines(monkeypatch):
    monkeypatch.setattr(recordings, "KEPT", None)  # a worker's own
    here = facts(torch.get_num_threads(), "cpu")
    Worker(here, here["threads"])._check()
    if not torch.cuda.is_available():
        with pytest.raises(ResultError, match="device cpu where cuda is expected"):
            Worker(here | {"device": "cuda"}, here["threads"])._check()
    for name in here.keys() - {"device"}:
        said = Worker(here | {name: "another"}, here["threads"]).record([], 0)  # before it looks at what to do
        kind, error = said.error
        assert kind == "ResultError" and f"{name} {str(here[name])[:20]}" in error and "\n" not in error
        assert ("--mixed" in error) == (name in ("processor", "threads"))
    assert here["processor"] == processor(torch.device("cpu"))


def test_worker_out_of_memory_is_a_one_line_error(monkeypatch):
    monkeypatch.setattr(recordings, "KEPT", None)  # a worker's own
    worker = Worker({}, torch.get_num_threads())
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate 2 GiB"), MemoryError()):

        def fails(unit, tick, error=error):
            raise error

        worker.version, worker.fn = 0, fails
        said = worker.compute(0, [], SHARDS[0], [], False)
        kind, message = said.error
        assert kind == "ResultError" and "a worker ran out of memory" in message and "\n" not in message
    worker.fn = lambda unit, tick: 1 / 0
    with pytest.raises(ZeroDivisionError):
        worker.compute(0, [], SHARDS[0], [], False)


def test_idle_workers_take_whole_groups_from_the_end():
    done = set()
    groups = {f"{group}{i}": f"{group}0" for group in "abc" for i in range(3)}
    tasks = ray_pool._Tasks(
        [ray_pool.deque(groups), ray_pool.deque()],
        groups.__getitem__,
        lambda task: groups[task] == task or groups[task] in done,
        lambda task: 1,
    )
    assert tasks.next(0) == "a0"
    assert tasks.next(1) == "c0"  # a group that is not begun, whole
    assert tasks.next(1) == "b0"  # its own wait for c0
    done |= {"a0", "b0", "c0"}
    assert [tasks.next(0) for _ in range(2)] == ["a1", "a2"]
    assert [tasks.next(1) for _ in range(4)] == ["c1", "c2", "b1", "b2"]
    assert tasks.next(0) is None and tasks.next(1) is None


# On Ray: `pool` is started once a session


def test_workers_match_one_process(pool, calls, alone, tmp_path):
    for name, call in calls.items():
        with placed_at(Place(pool)):
            seen = []
            found = call(folder=tmp_path / name, progress=lambda n, total, seen=seen: seen.append((n, total)))
        same(found, tmp_path / name, alone[name])
        assert sum(n for n, _ in seen) == seen[0][1]


def test_more_workers_than_ray_has_cpus_raise(pool, calls):
    with placed_at(Place(pool)):
        calls["activation_patching"]()
    with workers(2), pytest.raises(ResultError, match="2 workers asked for, but Ray has 0 CPUs free; ask for fewer"):
        calls["activation_patching"]()


@pytest.mark.long
def test_a_killed_worker_is_started_again(pool, calls, alone, tmp_path):  # `make kills` kills more, and the driver
    kills = []

    def kill(*_):
        if not kills:
            kills.append(pool.pids()[0])
            os.kill(kills[0], signal.SIGKILL)

    with placed_at(Place(pool)), pytest.warns(UserWarning, match="a worker ended .* is computed again by another"):
        found = calls["direction_norm"](folder=tmp_path, progress=kill)
    assert kills[0] not in pool.pids()
    same(found, tmp_path, alone["direction_norm"])


def test_workers_load_models_by_name_and_refuse_other_weights(pool, tmp_path):
    folder = tmp_path / "model"
    fresh("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    model = load_model(str(folder), device="cpu")
    expected = direction_norm(fresh("llama"), PROMPTS[:20], layers=[1], pairs=10)
    with placed_at(Place(pool)):
        found = direction_norm(model, PROMPTS[:20], layers=[1], pairs=10)
        pd.testing.assert_frame_equal(found.frame, expected.frame, check_exact=True)
        model = load_model(str(folder), device="cpu")
        other = fresh("llama")
        other.model.layers[0].mlp.down_proj.weight.mul_(1.5)
        other.save_pretrained(folder)
        with pytest.raises(
            ModelError, match=r"a worker has another model: weights_sha256 .*give every worker the same"
        ):
            direction_norm(model, PROMPTS[:20], layers=[1], pairs=10)
        model = load_model(str(folder), device="cpu")
        model.hf.model.layers[0].mlp.down_proj.weight.mul_(1 / 1.5)  # changed since it was loaded: sent whole
        again = direction_norm(model, PROMPTS[:20], layers=[1], pairs=10)
        with pytest.raises(ModelError, match=r"workers need a plain Hugging Face model; .* wrapped by nnsight"):
            direction_norm(traced(fresh("llama")), PROMPTS[:20], layers=[1], pairs=10)
        spread: Any = fresh("llama")
        spread.hf_device_map = {"model": "cuda:0", "lm_head": "cuda:1"}  # as accelerate leaves it
        with pytest.raises(ModelError, match="is spread over cuda:0, cuda:1: run without workers"):
            direction_norm(spread, PROMPTS[:20], layers=[1], pairs=10)
    assert np.allclose(again.frame["kl"], expected.frame["kl"], rtol=1e-3, atol=1e-9)
