"""Run commands as a user types them, in this process, on a tiny model, small SAEs and short texts."""

import contextlib
import functools
import inspect
import io
import runpy
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.figure import Figure

from diagnostics.results.stored import save_tokens
from diagnostics.sae_evaluation.result import SAEEvaluation
from interventions import Site, record
from interventions.files import write_frame, write_json
from interventions.models import loading
from sae_models.architectures import build, named
from sae_models.saving import save_sae
from tests.diagnostics.disentanglement import made_facts
from tests.diagnostics.made_results import evaluation
from tests.tiny import prompts, tiny_model, tokenizer

SCRIPTS = Path(__file__).parents[2] / "scripts"

MODEL = ("--model", "{given}/model", "--device", "cpu")
TEXT = (*MODEL, "--prompts", "{given}/text.txt", "--n-prompts", 24)
ALL = (*TEXT, "--held-out", 0)
ALL_LATENTS = ("--all-latents", "--tokens-per-latent", 4, "--n-prompts", 0, "--scan-tokens", 150, "--path-share", 0.1)
"""of `atlas`: a small run of a whole dictionary"""
DIRECTIONS = ("--saes", "{given}/saes/2/standard", *ALL, "--latents", 4, "--tokens-per-latent", 30, "--detail", 0.3)
SMALL: dict[str, tuple[object, ...]] = {
    "ablate_features": (
        *("--saes", "{given}/saes/4/standard", *MODEL, "--data", "{given}/labelled.csv", "--concepts", "b", "c"),
        *("--counts", 1, 3, "--per-class", 40, "--reads", 3, "--sink-filter", 0),
    ),
    "ablate_projections": DIRECTIONS,
    "activation_patching": (
        *(*MODEL, "--pairs", "{given}/pairs.csv", "--layers", 1, 4, "--sites", "z", "mlp_out", "--scores", "gradient"),
    ),
    "atlas": ("--saes", "{given}/saes/2/standard", *ALL, "--path-share", 0.5),
    "autointerp": (
        *("--saes", "{given}/saes/2/standard", *ALL, "--latents", 5, "--min-active", 3, "--snippets", 3, "--width", 5),
        *("--top", 3, "--more", 1),
    ),
    "bench_patching": ("--pairs", "S2", "--seconds", 0.01),
    "bench_replay": ("--lengths", 12, "--layers", 3, 4, "--rows", 40, "--repeats", 1, "--dtypes", "float32"),
    "bench_sae_training": (
        *("--layer", 1, "--d-sae", 64, "--k", 4, "--batch-tokens", 128, "--steps", 2, "--repeats", 1),
        *("--text-tokens", 1024),
    ),
    "bench_workers": (
        *(*MODEL, "--prompts", "{given}/text.txt", "--n-prompts", 24, "--pairs", 20, "--task", "{given}/pairs.csv"),
        *("--tasks", 5),
    ),
    "bipolar_census": ("--saes", "{given}/saes/2/abstopk", *ALL, "--min-active", 3),
    "causal_dimension": (
        *(*TEXT, "--layers", 2, 4, "--tokens", 20, "--saes", "{given}/saes/2/standard", "--spans", 2, 8),
    ),
    "compare_saes": ("--saes", "{given}/saes/1/standard", "{given}/saes/1/cosine", *ALL, "--min-active", 3),
    "disentangle": (
        *(
            *MODEL,
            "--saes",
            "{given}/saes/2/standard",
            "--facts",
            "{given}/facts.csv",
            "--questions",
            "{given}/questions.csv",
        ),
        *("--ks", 2, 8, "--pairs", 10, "--learn", 1),
    ),
    "dose_response": (*TEXT, "--layers", 1, 4, "--doses", 0.1, 0.5, "--tokens", 20),
    "edge_patching": (*MODEL, "--pairs", "{given}/pairs.csv", "--receivers", "4.q.1", "logits", "--n", 5),
    "evaluate_saes": (
        *("--saes", "{given}/saes/1/standard", "{given}/saes/4/standard", *TEXT, "--n-prompts", 8, "--held-out", 0.5),
        *("--splice-prompts", 4),
    ),
    "faithfulness": (
        *(*MODEL, "--pairs", "{given}/pairs.csv", "--n", 5, "--circuit", "1.z.0", "3.mlp_out"),
        *("--scope", "z", "mlp_out", "--n-random", 2),
    ),
    "interactions": (
        *("--saes", "{given}/saes/1/standard", *ALL, "--n-tokens", 14, "--per-token", 3, "--matrix-latents", 5),
        *("--min-tokens", 2, "--latents", 8, "--tokens-per-latent", 2, "--coefficients", 1, 4, "--ahead", 2),
    ),
    "n2g": (
        *("--saes", "{given}/saes/2/standard", *ALL, "--latents", 3, "--examples", 3, "--longest", 4),
        *("--min-active", 3, "--pad", 1),
    ),
    "patch_direction_norm": (*TEXT, "--layers", 1, 4, "--pairs", 20),
    "plot_depth": ("--figures", "sae_latents"),
    "polarity": (
        *("--d-model", 6, "--active", 1.5, "--budgets", 2, 6, "--steps", 5, "--batch", 32, "--test-rows", 500),
        *("--seeds", 2, "--superpositions", 1, "--rhos", -1),
    ),
    "probe_perturbation": (
        *(
            "--saes",
            "{given}/saes/1/standard",
            *MODEL,
            "--data",
            "{given}/labelled.csv",
            "--crossed",
            "{given}/crossed.csv",
        ),
        *("--ks", 1, 4, "--seeds", 2, "--per-class", 12),
    ),
    "probe_saes": (
        *("--saes", "{given}/saes/1/standard", *MODEL, "--data", "{given}/labelled.csv", "--ks", 1, 3, "--seeds", 2),
        *("--per-class", 10, "--shuffles", 9, "--refits", 3),
    ),
    "report": (),
    "latent_card": (
        *("--saes", "{given}/saes/1/cosine", *ALL, "--latents", 3, "--effects", 12, "--top", 3, "--few", 1),
    ),
    "scaling_laws": (
        *(*MODEL, "--prompts", "{given}/text.txt", "--n-prompts", 8, "--held-out", 0.5, "--layer", 2),
        *("--d-sae", 8, 16, 32, 64, "--k", 1, 2, 4, "--cells", "16x2", "--seeds", 0, 1, "--tokens", 320),
        *("--batch-tokens", 32, "--train-length", 20, "--splice-prompts", 6, "--draws", 5, "--sink-filter", 0),
    ),
    "shapley": (*MODEL, "--pairs", "{given}/pairs.csv", "--n", 5, "--components", "1.z.0", "4.z.2", "3.mlp_out"),
    "specification_curve": (*TEXT, "--layers", 0, 2, 4, "--pairs", 20),
    "train_sae": (
        *(*MODEL, "--prompts", "{given}/text.txt", "--max-length", 20, "--layers", 1, "--d-sae", 48, "--k", 4),
        *("--lr", 0.01, "--tokens", 330, "--batch-tokens", 32, "--buffer-tokens", 96),
    ),
    "train_zoo": ("--tokens", 640),
    "unit_norm": (*TEXT, "--layers", 1, 4, "--tokens", 30),
    "win_rate": (*DIRECTIONS, "--single-token-share", 1, "--draws", 10),
}
"""The options of each command's small run, without --out."""
FIRST = {
    "plot_depth": ("{given}/results",),
    "report": ("{given}/results",),
}
"""Positional arguments of the small run."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    said: str
    err: str
    folder: Path
    """--out"""

    @property
    def error(self) -> str:
        """The one line of the error; only progress bars of loading weights may precede it."""
        assert (self.status, self.said) == (2, ""), self
        *bars, line = self.err.replace("\r", "\n").rstrip("\n").split("\n")
        assert all(not bar.strip() or "%|" in bar for bar in bars) and line.startswith("error: "), self.err
        return line.removeprefix("error: ")

    @property
    def files(self) -> dict[str, bytes]:
        """The files in --out by their paths, without lock files."""
        paths = [path for path in self.folder.rglob("*") if path.is_file() and path.name not in (".lock", "lock")]
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in paths}


class _Stream(io.StringIO):
    """Has a terminal's encoding, so that help is drawn with boxes."""

    encoding = "utf-8"


@dataclass(frozen=True)
class Script:
    """Runs commands: `script("atlas", "--steps", 3)` is `scripts/atlas.py` with its small run's options, then --steps 3.

    Positional words before the first option replace the small run's. Figures are built, but their files stay empty: drawing takes
    longer than all else, and is tested elsewhere.
    """

    given: Path
    """model, texts, SAEs and results that commands take"""
    folder: Path
    """parent of --out, unless the words give it"""
    runs: dict[str, Ended] = field(default_factory=dict)
    """the small runs made so far"""

    def __call__(self, name: str, *words: object, small: bool = True) -> Ended:
        """`small=False` leaves the small run's options out."""
        typed = list(map(str, words))
        first = list(takewhile(lambda word: not word.startswith("--"), typed))
        usual = [str(word).format(given=self.given) for word in SMALL.get(name, ()) if small]
        named = first or [word.format(given=self.given) for word in FIRST.get(name, ()) if small]
        argv = [f"scripts/{name}.py", *named, *usual, *typed[len(first) :]]
        if "--out" not in argv and name != "train_zoo":
            argv += ["--out", str(self.folder / "out")]
        status, said, err = 0, _Stream(), _Stream()
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            patch.setattr(sys, "argv", argv)
            patch.setattr(Figure, "savefig", _undrawn(Figure.savefig))
            patch.setattr(Figure, "draw_without_rendering", lambda self: None)
            warnings.filterwarnings("always", category=UserWarning)  # the command shows them as a user sees them
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(err):
                try:
                    runpy.run_path(str(SCRIPTS / argv[0].removeprefix("scripts/")), run_name="__main__")
                except SystemExit as ended:
                    status = ended.code
        plt.close("all")
        folder = Path(argv[argv.index("--out") + 1]) if "--out" in argv else self.folder
        return Ended(status, said.getvalue(), err.getvalue(), folder)

    def finished(self, name: str) -> Ended:
        """The small run, made once for all tests: read its folder, but write only into a copy."""
        if name not in self.runs:
            self.runs[name] = replace(self, folder=self.given / "runs" / name)(name)
        assert self.runs[name].status == 0, self.runs[name].err
        return self.runs[name]

    def patch(self, patch: pytest.MonkeyPatch, name: str, **functions: Callable[..., object]) -> None:
        """Replace functions that a command imports, where they are defined and in the module of its `main`."""
        names = runpy.run_path(str(SCRIPTS / f"{name}.py"))
        body = sys.modules.get(names["main"].__module__)  # None if `main` is defined in the script
        for attribute, function in functions.items():
            defined = (vars(body) if body else names)[attribute].__module__
            for module in filter(None, (sys.modules[defined], body)):
                patch.setattr(module, attribute, function)


def _undrawn(savefig: Callable[..., object]) -> Callable[..., object]:
    """`savefig` that leaves files of figures empty; figures in pages are drawn."""

    def save(figure: Figure, where: object, **how: object) -> object:
        return (
            Path(where).write_bytes(b"not drawn") if isinstance(where, (str, Path)) else savefig(figure, where, **how)
        )

    return save


@pytest.fixture
def script(given, _runs, tmp_path) -> Script:
    """Commands that write into this test's folder."""
    return Script(given, tmp_path, _runs)


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model fails the test."""
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))


@pytest.fixture(scope="session", autouse=True)
def _sources_read_once():
    """Each command's options have their help from the source of their class, which takes half of the time of a refusal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect, "getsource", functools.cache(inspect.getsource))
        yield


@pytest.fixture(scope="session")
def _runs() -> dict[str, Ended]:
    return {}


@pytest.fixture(scope="session")
def given(tmp_path_factory) -> Path:
    """A folder with a randomly initialised model and its tokenizer, two texts of 24 paragraphs, texts of three classes that each
    have their own word, SAEs by layer and name, one of another width, and a result."""
    folder = tmp_path_factory.mktemp("given")
    tiny_model("llama").save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    texts = [" ".join(f"w{i}" for i in ids) for ids in prompts(tuple(14 + (7 * i) % 11 for i in range(24)))]
    for name, some in (("text", texts), ("other", [" ".join(reversed(t.split())) for t in texts])):
        (folder / f"{name}.txt").write_text("\n\n".join(some) + "\n")
    lines = [
        " ".join([f"w{90 + i % 3}", *(f"w{j}" for j in ids), f"w{90 + i % 3}"])
        for i, ids in enumerate(prompts((10,) * 132))
    ]
    (folder / "labelled.csv").write_text(
        "\n".join(["text,label", *(f"{t},{'abc'[i % 3]}" for i, t in enumerate(lines))]) + "\n"
    )
    kinds = ("a/x", "a/y", "b/x", "b/y")  # two attributes, each with a word of its own
    said = [f"{'w90' if i % 4 < 2 else 'w91'} {lines[i]} {'w92' if i % 2 else 'w93'}" for i in range(len(lines))]
    (folder / "crossed.csv").write_text(
        "\n".join(["text,label", *(f"{t},{kinds[i % 4]}" for i, t in enumerate(said))]) + "\n"
    )
    made_facts.files(folder)
    pairs = ["clean,corrupt,right,wrong"]
    for i, ids in enumerate(prompts((7,) * 40)):
        ids = [30 + j % 60 for j in ids]  # w2 is a special token, also within w20
        both = [ids, [*ids[:3], 30 + (ids[3] - 23) % 60, *ids[4:]]]
        answers = [30 + i % 20, 60 + i % 20]
        m = tiny_model("llama")(torch.tensor(both)).logits[:, -1, answers] @ torch.tensor([1.0, -1.0])
        answers = (
            answers if m[0] > m[1] else answers[::-1]
        )  # the clean prompt is the one that favours the right answer more
        said = (" ".join(f"w{j}" for j in x) for x in both)
        pairs.append(",".join([*said, *(f" w{j}" for j in answers)]))
    (folder / "pairs.csv").write_text("\n".join(pairs) + "\n")
    kinds = {
        "1/standard": "standard",
        "1/cosine": "cosine",
        "2/standard": "standard:relu",
        "4/standard": "standard:relu",
        "5/cosine": "cosine:relu",
        "2/abstopk": "abstopk",
    }
    sites = {name: Site(int(name[0])) for name in kinds}
    recording = record(tiny_model("llama"), prompts((20, 20, 20)), list(set(sites.values())), keep_cache=False)
    for i, (name, kind) in enumerate(kinds.items()):
        x = recording.activations[sites[name]].flatten(0, 1)
        belongs = {"model_name": "model", "hook_name": sites[name].hook_name}
        sae = build(named(kind), 40, 6, x, torch.Generator().manual_seed(i), **belongs)
        if named(kind).selector == "batchtopk":
            sae.selector.threshold.fill_(0.2)
        save_sae(sae, folder / "saes" / name)
    generator = torch.Generator().manual_seed(9)
    wide = build(named("standard:relu"), 8, 2, torch.randn(9, 16), generator, hook_name=Site(1).hook_name)
    save_sae(wide, folder / "saes" / "wide")
    store(evaluation(), folder / "results" / "zoo")
    return folder


def store(result, folder: Path) -> None:
    """A result's files, without its figures."""
    folder.mkdir(parents=True)
    write_frame(folder / f"{result.NAME}.parquet", result.frame)
    write_json(folder / f"{result.NAME}.json", result.as_dict())
    save_tokens(folder / "tokens.npy", result.tokens)
    if isinstance(result, SAEEvaluation):
        for name, file in result.TABLES.items():
            write_frame(folder / file, getattr(result, name))
