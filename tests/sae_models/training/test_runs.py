"""Training runs: the files of a run, and that a run stopped anywhere resumes to the same bytes."""

import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from sae_models import load_sae, save_sae, saving
from sae_models.architectures import named
from sae_models.errors import SAEError
from sae_models.training.recipe import Recipe
from sae_models.training.runs import Job, train
from sae_models.training.trainer import SAETraining
from tests.sae_models.built import inputs, random_sae

STEPS, EVERY, LOG = 7, 2, 3
SHORT = Recipe(d_sae=20, k=3, lr=0.01, dead_window=0.1)
JOBS = [
    Job("15/standard", "late", named("standard"), SHORT, "m", "blocks.15.hook_resid_post"),
    Job("15/cosine", "late", named("cosine"), SHORT),
    Job("7/topk", "early", named("aligned:topk"), replace(SHORT, seed=1)),
    Job("7/jumprelu", "early", named("jumprelu"), replace(SHORT, bandwidth=0.5, l0=0.05)),
]
SETTINGS = {"steps": STEPS, "log_every": LOG, "checkpoint_every": EVERY, "about": {"text": "ours", "tokens": 7}}


class Stop(BaseException):
    """As a signal would."""


def batch(n):
    """Number n of the stream, from any number of sources."""
    return {name: inputs(16, seed=1000 * i + n, dtype=torch.float32) for i, name in enumerate(("early", "late"))}


def plain(n=STEPS, stop_at=None):
    """No more than an iterator."""
    for i in range(n):
        if i == stop_at:
            raise Stop
        yield batch(i)


class Resuming:
    """A stream that says where it stands."""

    def __init__(self, stop_at=None, n=STEPS):
        self.at, self.stop_at, self.n, self.drawn = 0, stop_at, n, []

    def __iter__(self):
        return self

    def __next__(self):
        if self.at == self.stop_at:
            raise Stop
        if self.at == self.n:
            raise StopIteration
        self.drawn.append(self.at)
        self.at += 1
        return batch(self.at - 1)

    def state_dict(self):
        return {"at": self.at, "noise": torch.ones(2)}

    def load_state_dict(self, state):
        self.at = state["at"]


class Starting(Resuming):
    """The same as an iterable whose iterator is another object."""

    def __iter__(self):
        while self.at < self.n:
            yield self.__next__()


STREAMS = {"plain": lambda stop_at=None: plain(stop_at=stop_at), "resumable": Resuming, "iterable": Starting}


def kept(folder: Path) -> dict[str, bytes]:
    """What a finished run leaves, but for its lock."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    files.pop("lock", None)
    return files


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    saes = train(plain(), JOBS, folder=folder, **SETTINGS)
    return kept(folder), saes


def assert_finished_alike(folder, saes, undisturbed):
    expected, theirs = undisturbed
    found = kept(folder)
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == expected[name], name
    for name, sae in saes.items():
        x = inputs(dtype=torch.float32)
        assert torch.equal(sae(x), theirs[name](x))


# Finished runs


def test_each_job_is_trained_as_if_alone(undisturbed):
    _, saes = undisturbed
    without_folder = train(plain(), JOBS, **SETTINGS)
    for name, sae in saes.items():
        assert all(torch.equal(*both) for both in zip(sae.parameters(), without_folder[name].parameters(), strict=True))
        assert sae.metadata == without_folder[name].metadata
    assert list(saes) == [job.name for job in JOBS]
    for job in JOBS:
        alone = SAETraining(job.architecture, job.recipe, batch(0)[job.source], steps=STEPS)
        for n in range(STEPS):
            alone.step(batch(n)[job.source])
        x = inputs(dtype=torch.float32)
        assert torch.equal(saes[job.name](x), alone.sae(x)) and saes[job.name].encode(x).any()


def test_files_of_a_finished_run(undisturbed):
    found, saes = undisturbed
    weights = {f"{job.name}/{name}" for job in JOBS for name in (saving.CONFIG, saving.WEIGHTS)}
    assert found.keys() == {"run.json", "metrics.jsonl", "manifest.json", *weights}
    lines = [json.loads(line) for line in found["metrics.jsonl"].decode().splitlines()]
    assert [(line["sae"], line["step"]) for line in lines] == [(job.name, n) for n in (3, 6, 7) for job in JOBS]
    assert [line["tokens"] for line in lines[:: len(JOBS)]] == [48, 96, 112]
    assert {"fve", "l0", "dead", "loss", "lr"} <= lines[0].keys()
    assert len({line["fve"] for line in lines}) == len(lines)
    about = json.loads(found["run.json"])
    assert about["about"] == SETTINGS["about"] and about["steps"] == STEPS and set(about["jobs"]) == set(saes)


def test_saes_record_their_origin_and_progress_gives_metrics(tmp_path):
    said = []
    saes = train(plain(), JOBS, folder=tmp_path, progress=lambda *now: said.append(now), **SETTINGS)
    assert [(n, total) for n, total, _ in said] == [(1, STEPS)] * STEPS
    assert [bool(metrics) for _, _, metrics in said] == [False, False, True, False, False, True, True]
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert said[2][2] == {key: value for key, value in line.items() if key != "sae"}
    first = saes["15/standard"]
    assert (first.model_name, first.hook_name) == ("m", "blocks.15.hook_resid_post")
    assert saes["7/topk"].model_name is None
    for job in JOBS:
        loaded = load_sae(tmp_path / job.name)
        assert torch.equal(loaded(inputs(dtype=torch.float32)), saes[job.name](inputs(dtype=torch.float32)))
        for sae in (loaded, saes[job.name]):
            assert sae.metadata["text"] == "ours" and sae.metadata["steps"] == STEPS
            assert sae.metadata["recipe"]["seed"] == job.recipe.seed
            assert sae.metadata["architecture"]["score"] == job.architecture.score
            assert sae.metadata["training"]["step"] == STEPS
        assert not any(parameter.requires_grad for parameter in saes[job.name].parameters())


# Resuming


@pytest.mark.parametrize(
    ("stream", "stop_at"),
    [
        ("plain", 0),
        ("plain", 6),
        *((stream, n) for stream in STREAMS for n in (1, 4, 5)),  # before, at and after a checkpoint
    ],
)
def test_resumed_run_ends_in_the_same_bytes(stream, stop_at, undisturbed, tmp_path):
    with pytest.raises(Stop):
        train(STREAMS[stream](stop_at), JOBS, folder=tmp_path, **SETTINGS)
    assert (tmp_path / "checkpoint.pt").exists() == (stop_at >= EVERY)
    again, said, kept_steps = STREAMS[stream](), [], stop_at // EVERY * EVERY
    saes = train(again, JOBS, folder=tmp_path, progress=lambda *now: said.append(now), **SETTINGS)
    # it went on where the last checkpoint was, and a resumable stream did not draw again what was before
    assert [n for n, _, _ in said] == ([kept_steps] if kept_steps else []) + [1] * (STEPS - kept_steps)
    if stream == "resumable":
        assert again.drawn == list(range(kept_steps, STEPS))
    assert_finished_alike(tmp_path, saes, undisturbed)


@pytest.mark.parametrize("checkpoint_every", [3, 5])
def test_run_stopped_at_any_write_ends_in_the_same_bytes(checkpoint_every, tmp_path, monkeypatch):
    """Stopped before and after each file takes its place, with and without checkpoints."""
    jobs, settings = JOBS[:2], {"steps": 4, "log_every": 2, "checkpoint_every": checkpoint_every}
    saes = train(plain(), jobs, folder=tmp_path / "undisturbed", **settings)
    undisturbed = kept(tmp_path / "undisturbed"), saes
    n, finished = 0, False
    while not finished:
        folder, calls = tmp_path / str(n), []

        def interrupted(does, *args, calls=calls, die=n, **options):
            calls.append(args)
            if len(calls) == die // 2 + 1 and die % 2 == 0:
                raise Stop
            does(*args, **options)
            if len(calls) == die // 2 + 1:
                raise Stop

        replaces, saves = os.replace, torch.save
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", lambda *args, f=interrupted, does=replaces: f(does, *args))
            patched.setattr(torch, "save", lambda *args, f=interrupted, does=saves: f(does, *args))
            try:
                train(plain(), jobs, folder=folder, **settings)
                finished = True
            except Stop:
                pass
        saes = train(plain(), jobs, folder=folder, **settings)
        assert_finished_alike(folder, saes, undisturbed)
        n += 1
    assert n > 10


def test_kept_copies_of_an_interrupted_run_are_exact(tmp_path):
    recipe = replace(SHORT, threshold_from=0.2)
    jobs = [Job("a", "late", named("cosine"), recipe), Job("b", "early", named("standard"), recipe)]
    settings = SETTINGS | {"keep_every": 3}
    train(plain(), jobs, folder=tmp_path / "undisturbed", **settings)
    for stop_at in (3, 4, 6):
        with pytest.raises(Stop):
            train(plain(stop_at=stop_at), jobs, folder=tmp_path / "again", **settings)
    train(plain(), jobs, folder=tmp_path / "again", **settings)
    assert kept(tmp_path / "again") == kept(tmp_path / "undisturbed")
    x = inputs(dtype=torch.float32)
    for job in jobs:
        alone = SAETraining(job.architecture, job.recipe, batch(0)[job.source], steps=STEPS)
        for n in range(6):
            alone.step(batch(n)[job.source])
            if n + 1 in (3, 6):
                copy = load_sae(tmp_path / "again" / job.name / f"tokens-{16 * (n + 1)}")
                z = alone.sae.encode(x)
                assert torch.equal(copy.encode(x), z) and z.any()
                assert torch.equal(copy(x), alone.sae(x))
    assert not (tmp_path / "again/a/tokens-112").exists()  # the last stands in its own folder
    with pytest.raises(SAEError, match=r"holds another run \(keep_every only there\)"):
        train(plain(), jobs, folder=tmp_path / "again", **SETTINGS)
    with pytest.raises(SAEError, match="keep_every 3 with folder None; expected at least 1 step, and a folder"):
        train(plain(), jobs, **settings)
    with pytest.raises(SAEError, match=r"a: keep_every 1 is before step 2, from which BatchTopK learns its threshold"):
        train(plain(), jobs, folder=tmp_path / "third", **settings | {"keep_every": 1})


def test_finished_run_is_loaded_without_training(undisturbed, tmp_path):
    train(plain(), JOBS, folder=tmp_path, **SETTINGS)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "lock"}
    stream = Resuming(stop_at=0)  # is not asked for anything
    saes = train(stream, JOBS, folder=tmp_path, **SETTINGS)
    assert stream.drawn == []
    assert_finished_alike(tmp_path, saes, undisturbed)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "lock"}
    for name, sae in saes.items():
        theirs = undisturbed[1][name]
        assert sae.metadata == json.loads(json.dumps(theirs.metadata))
        assert (sae.model_name, sae.hook_name) == (theirs.model_name, theirs.hook_name)
        assert not any(parameter.requires_grad for parameter in sae.parameters())


# Errors


@pytest.fixture(scope="module", params=[3, None], ids=["stopped", "finished"])
def another(request, tmp_path_factory):
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("another")
    with contextlib.suppress(Stop):
        train(plain(stop_at=request.param), JOBS, folder=folder, **SETTINGS)
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": STEPS - 1},
        {"log_every": 1},
        {"about": {"text": "another"}},
        {"recipe": replace(SHORT, lr=0.02)},
        {"architecture": named("tied")},
        {"source": "early"},
        {"name": "other"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_folder_of_another_run_is_refused_and_kept(changes, another):
    before, settings, jobs = kept(another), SETTINGS, JOBS
    if changes.keys() <= SETTINGS.keys():
        [named_there], settings = changes, SETTINGS | changes
    else:
        named_there, jobs = "jobs", [replace(JOBS[0], **changes), *JOBS[1:]]
    with pytest.raises(
        SAEError, match=rf"holds another run \({named_there}.*\); give another folder, or remove this one"
    ):
        train(plain(), jobs, folder=another, **settings)
    assert kept(another) == before


@pytest.mark.parametrize(
    ("jobs", "changes", "message"),
    [
        ([JOBS[0], JOBS[0]], {}, "jobs named 15/standard, 15/standard; expected some, each of another name"),
        ([], {}, "jobs named nothing"),
        (JOBS, {"steps": 0}, "a run of 0 steps, logged every 3; expected at least 1 of each"),
        (JOBS, {"steps": -1}, "a run of -1 steps"),
        (JOBS, {"log_every": 0}, "a run of 7 steps, logged every 0"),
        (JOBS, {"folder": ""}, "an empty name of a folder"),
    ],
)
def test_invalid_runs_raise_and_write_nothing(jobs, changes, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SAEError, match=message):
        train(plain(), jobs, **{"folder": tmp_path / "new", **SETTINGS, **changes})
    assert not any(tmp_path.iterdir())


def test_unknown_source_raises():
    with pytest.raises(SAEError, match="no activations of nowhere in the batches, which hold early, late"):
        train(plain(), [replace(JOBS[0], source="nowhere")], steps=STEPS)


@pytest.mark.parametrize("stream", [lambda n: plain(n), lambda n: Resuming(n=n)])
def test_run_resumes_after_its_stream_ended_early(stream, undisturbed, tmp_path):
    with pytest.raises(SAEError, match="the stream ended after 5 batches of 7; give more text, or fewer steps"):
        train(stream(5), JOBS, folder=tmp_path, **SETTINGS)
    assert_finished_alike(tmp_path, train(stream(STEPS), JOBS, folder=tmp_path, **SETTINGS), undisturbed)


def test_nonfinite_loss_ends_the_run(tmp_path):
    wild = [replace(JOBS[2], recipe=replace(SHORT, lr=1e30))]
    with pytest.raises(SAEError, match=r"the loss is (nan|inf) at step 3; lower lr \(1e\+30\)"):
        train(plain(), wild, folder=tmp_path, steps=STEPS, log_every=LOG)
    assert not (tmp_path / "7" / "topk").exists()


def test_one_run_at_a_time_in_a_folder(tmp_path):
    def meanwhile(*_):
        with pytest.raises(SAEError, match="is being written by another run; wait for it or give another folder"):
            train(plain(), JOBS, folder=tmp_path, **SETTINGS)

    train(plain(), JOBS, folder=tmp_path, progress=meanwhile, **SETTINGS)
    with FileLock(tmp_path / "lock", timeout=0):  # given back at the end
        pass
    with pytest.raises(Stop):
        train(plain(stop_at=5), JOBS, folder=tmp_path / "second", steps=STEPS)
    with FileLock(tmp_path / "second" / "lock", timeout=0):  # and when it breaks off
        pass
    # a checkpoint at each twentieth of the run by default: here at every step
    assert torch.load(tmp_path / "second" / "checkpoint.pt", weights_only=True)["done"] == 5


# Files of other runs


def foreign(place):
    """An SAE of the same shape that somebody else put there."""
    return save_sae(random_sae("standard", "relu", dtype=torch.float32), place)


@pytest.mark.parametrize("what", ["15/standard", "7/topk", "metrics.jsonl", "checkpoint.pt", "manifest.json"])
def test_folder_that_no_run_wrote_is_kept(what, tmp_path):
    if "/" in what:
        foreign(tmp_path / what)
    else:
        (tmp_path / what).write_bytes(b"somebody's")
    before = kept(tmp_path)
    with pytest.raises(
        SAEError, match=rf"has {what}, and no run.json that says which run wrote it; it is left as it is"
    ):
        train(Resuming(stop_at=0), JOBS, folder=tmp_path, **SETTINGS)
    assert kept(tmp_path) == before


@pytest.mark.parametrize("only", ["cfg.json", "sae_weights.safetensors", None])
@pytest.mark.parametrize("ended", [False, True], ids=["stopped", "ended"])
def test_foreign_sae_in_the_place_of_our_own_is_kept(only, ended, tmp_path):
    with contextlib.nullcontext() if ended else pytest.raises(Stop):
        train(plain(stop_at=None if ended else 5), JOBS, folder=tmp_path, **SETTINGS)
    place = tmp_path / "15/standard"
    other = foreign(tmp_path / "other")
    place.mkdir(parents=True, exist_ok=True)
    for name in (only,) if only else ("cfg.json", "sae_weights.safetensors"):
        (place / name).write_bytes((other / name).read_bytes())
    before = kept(tmp_path)
    with pytest.raises(
        SAEError, match=r"15/standard(.* holds an SAE that this run did not write|, and| does not hold|.*digest)"
    ):
        train(Resuming(stop_at=0), JOBS, folder=tmp_path, **SETTINGS)
    assert kept(tmp_path) == before


def test_foreign_sae_written_during_the_run_is_kept(tmp_path):
    def meanwhile(_, __, said):
        if not (tmp_path / "7/topk").exists():
            foreign(tmp_path / "7/topk")

    with pytest.raises(SAEError, match="7/topk holds an SAE that this run did not write; it is left as it is"):
        train(plain(), JOBS, folder=tmp_path, progress=meanwhile, **SETTINGS)
    assert load_sae(tmp_path / "7/topk").metadata == {}
    assert (tmp_path / "checkpoint.pt").exists()  # the run can go on once it is moved


@pytest.mark.parametrize("content", ["[]", "{", "", "[" * 100_000])
def test_unreadable_run_json_is_kept(content, tmp_path):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(SAEError, match=r"run\.json (cannot be read|holds a list)"):
        train(plain(), JOBS, folder=tmp_path, **SETTINGS)
    assert (tmp_path / "run.json").read_text() == content


def test_damaged_or_foreign_checkpoint_is_refused(tmp_path):
    with pytest.raises(Stop):
        train(plain(stop_at=5), JOBS, folder=tmp_path / "one", **SETTINGS)
    other = [replace(job, recipe=replace(job.recipe, lr=0.02)) for job in JOBS]
    with pytest.raises(Stop):
        train(plain(stop_at=5), other, folder=tmp_path / "other", **SETTINGS)
    path, metrics = (tmp_path / "one" / name for name in ("checkpoint.pt", "metrics.jsonl"))
    good = path.read_bytes(), metrics.read_bytes()
    theirs = (tmp_path / "other" / "checkpoint.pt").read_bytes()
    for content, lines, says in (
        (
            theirs,
            good[1],
            "checkpoint.pt was not written by this run; remove checkpoint.pt to train from the beginning",
        ),
        (good[0][:-100], good[1], "checkpoint.pt is no file of torch weights, or damaged"),
        (b"", good[1], "checkpoint.pt is empty"),
        (good[0], good[1].replace(b"15", b"16"), "metrics.jsonl is not what it was when .*checkpoint.pt was written"),
        (good[0], good[1][:-5], "metrics.jsonl is not what it was"),
    ):
        path.write_bytes(content)
        metrics.write_bytes(lines)
        with pytest.raises(SAEError, match=says):
            train(plain(), JOBS, folder=tmp_path / "one", **SETTINGS)
    path.write_bytes(good[0])
    metrics.write_bytes(good[1])
    train(plain(), JOBS, folder=tmp_path / "one", **SETTINGS)
