"""The notebooks run as they are committed, from top to bottom, in any folder; and hold no output."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from recjax.data.simulate import World
from recjax.data.sources import DataDir
from recjax.tasks.next_item import NextItem

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


class ThisPython(AsyncKernelManager):
    """Kernels of the interpreter that runs the tests, whichever others are installed."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"])


@every_notebook
def test_it_is_committed_without_output(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type in ("markdown", "code")
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
    assert notebook.metadata.kernelspec.name == "python3"


@every_notebook
def test_it_runs(
    path: Path, prepare_here: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_here(NextItem(data=DataDir(simulate=World(num_events=5_000))))  # the examples of all notebooks
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("XLA_FLAGS", "JAX_NUMPY_RANK_PROMOTION"):  # as set for tests, not for readers
        monkeypatch.delenv(name)
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}, kernel_manager_class=ThisPython
    )
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert outputs and not [output for output in outputs if output.output_type == "error"]
    assert not any("Warning" in output.get("text", "") for output in outputs if output.get("name") == "stderr")
    assert list(tmp_path.iterdir()) == []
