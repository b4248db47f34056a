"""analysis.ipynb runs from top to bottom, on fewer glyphs, and is committed with its outputs."""
import os
import shutil
from base64 import b64decode
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient

import data
from models import create_model
from swap import misclassified

ROOT = Path(__file__).parent.parent
NOTEBOOK = nbformat.read(ROOT / "analysis.ipynb", as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]


def figures(cells):
    return [output for cell in cells for output in cell.outputs
            if "image/png" in output.get("data", {})]


def test_it_is_saved_with_its_outputs():
    counts = [cell.execution_count for cell in CODE]
    assert counts == list(range(1, len(CODE) + 1)), "run it from top to bottom, then save it"
    assert len(figures(CODE)) >= 8
    assert not [output for cell in CODE for output in cell.outputs
                if output.output_type == "error" or output.get("name") == "stderr"]
    text = (ROOT / "analysis.ipynb").read_text(encoding="utf-8")
    assert str(ROOT) not in text and str(Path.home()) + os.sep not in text


def test_the_readme_shows_its_first_figure():
    assert b64decode(figures(CODE)[0].data["image/png"]) == (ROOT / "results/swap.png").read_bytes()


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A copy of the scripts and logs, with few glyphs of all 47 classes and a teacher for them.

    The teacher nearly always says class 0, as some of the test images are labelled: no training
    decides whether it passes the door.
    """
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "results", tmp_path / "results")
    easy = dict(ROTATION=0, JITTER=0.05, DISTRACTORS=0, ZOOM=(1.1, 1.2), CONTRAST=(1, 1),
                NOISE=(0, 0.02))
    for name, value in easy.items():
        monkeypatch.setattr(data, name, value)
    parts = [*data.render_glyphs(300, seed=1), *data.render_glyphs(150, seed=2)]
    parts[3][:20] = 0
    teacher, folder = create_model("resnet14", 47), tmp_path / "runs/teacher-glyphs-resnet14"
    torch.nn.init.normal_(teacher.fc.weight, std=0.05)
    torch.nn.init.constant_(teacher.fc.bias[:1], 3)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"epochs": 1}')
    (folder / "metrics.jsonl").write_text('{"epoch": 1, "test_top1": 50}\n')
    checkpoint = dict(architecture="resnet14", epoch=1, model=teacher.state_dict())
    torch.save(checkpoint, folder / "last.pt")
    (tmp_path / "data").mkdir()
    arrays = dict(zip(("train_x", "train_y", "test_x", "test_y"), map(np.asarray, parts)))
    np.savez(tmp_path / f"data/glyphs-{data.GLYPHS_VERSION}.npz", **arrays)
    return tmp_path


def test_it_runs_from_top_to_bottom(small, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(small))
    notebook = nbformat.read(ROOT / "analysis.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3",
                   resources=dict(metadata=dict(path=str(small)))).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(figures(cells)) == len(figures(CODE))
    assert any("the teacher errs on" in output.get("text", "")
               for cell in cells for output in cell.outputs)


@pytest.mark.parametrize("teacher, what", [
    (lambda y: 9 * torch.eye(47)[y], "no mistake"),
    (lambda y: torch.randn(len(y), 47) + torch.eye(47)[y], "mistake, the label"),
    (lambda y: torch.eye(47)[torch.zeros_like(y)], "mistake, the label"),
    (lambda y: 9 * torch.eye(47)[(y + 1) % 47] + 4 * torch.eye(47)[y],
     "a clear mistake, the label second")],
    ids=["good", "poor", "constant", "always second"])
def test_the_examples_are_chosen_among_what_is_there(teacher, what, capsys):
    labels, names = torch.arange(47).repeat(2), {}
    first, = [k for k, cell in enumerate(CODE) if "def example_of" in cell.source]
    exec(CODE[0].source.split("device =")[0], names)
    plt.switch_backend("agg")
    names |= dict(glyphs=SimpleNamespace(classes=data.GLYPHS),
                  teacher_logits={"weak": teacher(labels)}, train_labels=labels,
                  views={"weak": labels}, show=lambda ax, image: None)
    for cell in CODE[first:first + 2]:
        exec(cell.source, names)
        plt.close("all")
    assert what in names["what"] and what in capsys.readouterr().out
    assert bool(misclassified(names["row"], names["label"])) == ("no mistake" not in what)
    assert data.GLYPHS[names["label"]] in names["names"]
    assert len(set(names["names"])) == len(names["names"])


def test_missing_logs_name_the_command_that_makes_them(small, monkeypatch):
    shutil.rmtree(small / "results/recipes")
    cell, = [cell for cell in CODE if "MAKES" in cell.source]
    monkeypatch.chdir(small)
    monkeypatch.syspath_prepend(str(small))
    import eval as evaluation
    names = dict(evaluation=evaluation, Path=Path)
    exec(cell.source.split("fig, axes")[0], names)
    with pytest.raises(SystemExit, match="python results/run.py recipes"):
        names["read"](evaluation.read_rows, "results/recipes")
