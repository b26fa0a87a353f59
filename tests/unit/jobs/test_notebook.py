"""`moekit.prune` in a notebook: a bar in the cell, and what the command prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiny import write_model, write_text

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

CELL = """
import json
import moekit

pruned = moekit.prune(
    "moe", method="reap", keep=0.5, data="text", out="half", max_tokens=500, proof_tokens=200, device="cpu"
)
print(json.dumps(pruned.to_dict(), default=str))
"""


@pytest.mark.full
@pytest.mark.slow
def test_a_cell_shows_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "moe", "qwen3_moe", num_hidden_layers=2)
    write_text(tmp_path / "text", documents=20)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    nbclient.NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = notebook.cells[0].outputs
    drawn = [output.data["text/plain"] for output in outputs if output.output_type == "display_data"]
    assert drawn, "no bar was drawn"
    assert any("2/2" in text for text in drawn), drawn
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    told = json.loads(printed.strip().splitlines()[-1])
    assert told["experts"] == {"before": 16, "after": 8}
    assert told["check"]["ok"]
