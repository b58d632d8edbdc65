"""Notebooks run from clean and show what they promise; what is committed is what they show; Ctrl-C in a cell leaves the model clean."""

import re
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import start_new_kernel

from tests.notebooks import FOLDER, ROOT, environment, executed, hash_of

NAMES = (
    "01_first_intervention",
    "02_direction_norm",
    "03_probe_a_latent",
    "04_your_model_your_sae",
    "05_activation_patching",
)
SHOWN = {
    "01_first_intervention": ("' Rome' 0.", "path: replay", "image/png"),
    "02_direction_norm": ("KL direction", "÷ placebo", "data:image/"),
    "03_probe_a_latent": ("KL of the placebo", "silent: ", "Latent", "data:image/", "image/png"),
    "04_your_model_your_sae": ("TransformerBridge", "BelongingError", "SAELens folder"),
    "05_activation_patching": ("z 20.0 at END", "17.z.4", "nothing_kept", "data:image/", "image/png"),
}
"""What a reader must find among the outputs."""
LOCAL = re.compile(r"/(?:tmp|root|home|Users|work|venv|usr|opt|var)/|[A-Z]:\\\\")


def read(name: str):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook) -> list:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def shown(notebook) -> str:
    """All that stands on the page below the code, pictures by their kind."""
    words = []
    for output in outputs(notebook):
        words += [output.get("text", ""), *output.get("data", {}).get("text/html", "").splitlines()]
        words += [output.get("data", {}).get("text/plain", ""), *output.get("data", {})]
    return "\n".join(words)


@pytest.mark.model
@pytest.mark.parametrize("name", [NAMES[0]])  # the others take minutes: `make notebooks` runs all
def test_notebook_runs_in_a_fresh_kernel(name):
    notebook = executed(FOLDER / f"{name}.ipynb")
    page = shown(notebook)
    for words in SHOWN[name]:
        assert words in page
    assert kinds(notebook) == kinds(read(name))


def kinds(notebook):
    """What the outputs of each code cell are, progress bars apart: text, pages, pictures."""
    bar = "application/vnd.jupyter.widget-view+json"
    return [
        sorted({key for output in cell.outputs if bar not in (data := output.get("data", {})) for key in data})
        for cell in code_cells(notebook)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_committed_outputs_are_current_and_without_errors(name):
    """`python -m tests.notebooks` writes them."""
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.metadata.outputs_of == hash_of(notebook)
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    assert all(words in shown(notebook) for words in SHOWN[name])
    assert not [out for out in outputs(notebook) if out.output_type == "error" or out.get("name") == "stderr"]
    assert not LOCAL.search(re.sub(r"data:image/[^\"]*", "", shown(notebook)))
    assert Path(FOLDER / f"{name}.ipynb").stat().st_size < 1_000_000


def test_every_notebook_is_tested():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NAMES)


_SETUP = """
import torch
from interventions import Site, measure, record
from tests.interrupted import left_on
from tests.tiny import bridge, edited, fresh, prompts, rows

hf = fresh("llama")
prompt, position = rows()
site = Site(2, "attn_out")

def effect(_=None):
    recording = record(hf, prompts(), [site])
    return measure(recording, site, prompt, position, edited(recording, site, prompt, position))["kl"]

expected, before = effect(), left_on(hf)
"""
_RUNS = """
print("running", flush=True)
while True:
    effect()
"""
_AFTER = """
assert left_on(hf) == before
assert torch.equal(effect(), expected)
"""


@pytest.mark.long
def test_interrupted_cell_leaves_the_model_unchanged():
    """Uses the kernel's own interrupt, as the stop button does."""
    manager, client = start_new_kernel(kernel_name="python3", env=environment(), cwd=str(ROOT))
    try:
        assert client.execute_interactive(_SETUP, timeout=120)["content"]["status"] == "ok"
        for _ in range(3):

            def interrupt(message):
                if message["content"].get("text", "").startswith("running"):
                    manager.interrupt_kernel()

            reply = client.execute_interactive(_RUNS, timeout=120, output_hook=interrupt)["content"]
            assert reply["ename"] == "KeyboardInterrupt"
            after = client.execute_interactive(_AFTER, timeout=120)["content"]
            assert after["status"] == "ok", after
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
