"""analysis.ipynb runs from top to bottom, on a smaller glyphs set, and is committed with its
outputs."""
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

from models import create_model
from results import pages
from support import glyphs
from swap import misclassified

ROOT = Path(__file__).parent.parent
NOTEBOOK = nbformat.read(ROOT / "analysis.ipynb", as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]


def figures(cells):
    return [output for cell in cells for output in cell.outputs
            if "image/png" in output.get("data", {})]


def test_it_is_saved_with_its_outputs():
    assert [cell.execution_count
            for cell in CODE] == list(range(1,
                                            len(CODE)
                                            + 1)), "run it from top to bottom, then save it"
    assert len(figures(CODE)) >= 8
    assert not [output for cell in CODE for output in cell.outputs if output.output_type == "error"
                or output.get("name") == "stderr"]
    text = (ROOT / "analysis.ipynb").read_text(encoding="utf-8")
    assert str(ROOT) not in text and str(Path.home()) + os.sep not in text


def test_the_readme_shows_its_first_figure():
    assert b64decode(figures(CODE)[0].data["image/png"]) == (ROOT / "results/swap.png").read_bytes()


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A copy of the repository's scripts and logs with a small glyphs set of all 47 classes in its
    cache, and a teacher that nearly always says class 0, as some of the test images are labelled:
    no training decides whether it passes the door."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for name in ("support", "results"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name, value in dict(ROTATION=0, JITTER=0.05, DISTRACTORS=0, ZOOM=(1.1, 1.2),
                            CONTRAST=(1, 1), NOISE=(0, 0.02)).items():
        monkeypatch.setattr(glyphs, name, value)
    parts = [*glyphs.render(300, seed=1), *glyphs.render(150, seed=2)]
    parts[3][:20] = 0
    teacher = create_model("resnet14", 47)
    folder = tmp_path / f"runs/teacher-glyphs-{glyphs.VERSION}-12-epochs-resnet14"
    torch.nn.init.normal_(teacher.fc.weight, std=0.05)
    torch.nn.init.constant_(teacher.fc.bias[:1], 3)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"epochs": 1}')
    (folder / "metrics.jsonl").write_text('{"epoch": 1, "test_top1": 50}\n')
    torch.save(dict(architecture="resnet14", epoch=1, model=teacher.state_dict()),
               folder / "last.pt")
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / f"data/glyphs-{glyphs.VERSION}.npz",
             **dict(zip(("train_x", "train_y", "test_x", "test_y"), map(np.asarray, parts))))
    return tmp_path


def test_it_runs_from_top_to_bottom(small, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(small))
    notebook = nbformat.read(ROOT / "analysis.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3",
                   resources=dict(metadata=dict(path=str(small)))).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(figures(cells)) == len(figures(CODE))
    assert any("the teacher errs on" in output.get("text", "") for cell in cells
               for output in cell.outputs)


@pytest.mark.parametrize("teacher, what", [
    (lambda y: 9 * torch.eye(47)[y], "no mistake"),
    (lambda y: torch.randn(len(y), 47) + torch.eye(47)[y], "mistake, the label"),
    (lambda y: torch.eye(47)[torch.zeros_like(y)], "mistake, the label"),
    (lambda y: 9 * torch.eye(47)[(y + 1) % 47] + 4 * torch.eye(47)[y],
     "a clear mistake, the label second, no class merged")],
    ids=["good", "poor", "constant", "always second"])
def test_the_examples_are_chosen_among_what_is_there(teacher, what, capsys):
    labels, names = torch.arange(47).repeat(2), {}
    first, = [k for k, cell in enumerate(CODE) if "def example_of" in cell.source]
    exec(CODE[0].source.split("settings =")[0], names)
    plt.switch_backend("agg")
    images = torch.zeros(len(labels), 3, 4, 4, dtype=torch.uint8)
    z = teacher(labels)
    names |= dict(glyphs=SimpleNamespace(classes=glyphs.CLASSES), z_t=dict(weak=z, strong=z),
                  y=labels, views=dict(weak=images, strong=images), test_x=images, test_y=labels,
                  z_test=z)
    for cell in CODE[first:first + 2]:
        exec(cell.source, names)
        plt.close("all")
    assert what in names["what"] and what in capsys.readouterr().out
    assert bool(misclassified(names["row"], names["label"])) == ("no mistake" not in what)
    shown = names["names"]
    assert glyphs.CLASSES[names["label"]] in shown and len(set(shown)) == len(shown)
    # The row whose label is far down, of a teacher that may have none.
    far, = [cell for cell in CODE if "sort_to_target(row" in cell.source]
    exec(far.source, names)
    plt.close("all")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["swap (S1)", "sort", "GA"]
    assert all("the label has rank 1 now" in line for line in lines[:2])


def test_missing_logs_name_the_command_that_makes_them(small, monkeypatch):
    shutil.rmtree(small / "results/glyphs/ladder")
    cell, = [cell for cell in CODE if "top1_of(LOGS)" in cell.source]
    monkeypatch.chdir(small)
    with pytest.raises(SystemExit, match="python results/run.py glyphs/ladder makes the logs"):
        exec(cell.source, dict(Path=Path, ROWS=pages.ROWS, top1_of=pages.top1_of))
