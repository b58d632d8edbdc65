"""Notebooks run from clean, as a reader runs them: `python -m tests.notebooks [01 …]` writes their outputs anew."""

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"


def environment() -> dict[str, str]:
    """Of the kernel: no network, figures in the page, and no word of a package that may be missing."""
    return os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",  # two kernels of two threads on two cores wait for each other for minutes
        "TOKENIZERS_PARALLELISM": "false",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm, where ipywidgets is not installed
    }


def executed(path: Path) -> Any:
    """The notebook with the outputs of a fresh kernel; whatever a cell raises is raised."""
    notebook = nbformat.read(path, as_version=4)
    there = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(notebook, timeout=1800, startup_timeout=300, record_timing=False, resources=there)
    return client.execute(env=environment())


def hash_of(notebook: Any) -> str:
    """Of the code of all cells."""
    code = "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()


def tidy(notebook: Any) -> Any:
    """Without what differs from run to run: progress bars, and which Python ran."""
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _progress(output)]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    about = {"kernelspec": kernel, "language_info": {"name": "python"}, "outputs_of": hash_of(notebook)}
    notebook.metadata = nbformat.from_dict(about)
    return notebook


def _progress(output: Any) -> bool:
    """Whether an output is a progress bar, as text or as a widget."""
    if output.output_type == "stream" and output.name == "stderr":
        return all("%|" in line or not line.strip() for line in output.text.replace("\r", "\n").split("\n"))
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {})


if __name__ == "__main__":
    for path in sorted(FOLDER.glob("*.ipynb")):
        if len(sys.argv) < 2 or path.name.startswith(tuple(sys.argv[1:])):
            nbformat.write(tidy(executed(path)), path)
            print(path.relative_to(ROOT))
