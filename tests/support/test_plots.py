"""The curves are those of the logs, and no file is written over."""
import json

import pytest

import eval as evaluation
from support.plots import plot


def test_curves_show_what_the_logs_say(tmp_path, write_run, command, monkeypatch):
    config = dict(gamma=1, schedule="step")
    write_run(tmp_path / "a", [40, 60], **config)
    write_run(tmp_path / "b", [50, 55, 80], **config)
    for name in "ab":
        path = tmp_path / name / "metrics.jsonl"
        rows = [json.loads(line) | dict(lr=0.1 ** i, loss_ce=1 / (i + 1))
                for i, line in enumerate(path.read_text().splitlines())]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loss, top1, _ = plot([tmp_path / "a", tmp_path / "b"]).axes
    drawn = {name: [list(line.get_ydata()) for line in ax.lines if line.get_label() == name]
             for ax, name in ((loss, "loss_ce"), (top1, "test_top1"))}
    assert drawn == {"loss_ce": [[1, 1 / 2], [1, 1 / 2, 1 / 3]],
                     "test_top1": [[40, 60], [50, 55, 80]]}
    marks = [(line.get_label(), line.get_xdata()[0]) for line in top1.lines
             if line.get_label() != "test_top1"]
    assert marks == [("γ", 1.5), ("learning rate falls", 1.5), ("γ", 1.5),
                     ("learning rate falls", 1.5), ("learning rate falls", 2.5)]
    monkeypatch.chdir(tmp_path)
    assert command(evaluation, "--plot", "a", "b")[0] == 0
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    status, _, err = command(evaluation, "--plot", "c")
    assert status == 2 and err.startswith("eval.py: c: ") and err.count("\n") == 1


def test_the_seeds_of_a_row_are_drawn_as_their_mean(tmp_path, write_run, command):
    write_run(tmp_path / "row/seed0", [40, 60, 65], seed=0)
    write_run(tmp_path / "row/seed1", [50, 66], seed=1)
    write_run(tmp_path / "alone", [30, 50], seed=0)
    figure = plot([tmp_path / "row", tmp_path / "alone"])
    top1 = figure.axes[1]
    assert [list(line.get_ydata()) for line in top1.lines] == [[45, 63], [30, 50]]
    (band,) = top1.collections
    assert {(x, y) for x, y in band.get_paths()[0].vertices.tolist()} == {
        (1, 40), (1, 50), (2, 60), (2, 66)}
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        f"{tmp_path / 'row'}, mean of 2 seeds", str(tmp_path / "alone")]
    # But not what are no seeds of one experiment.
    write_run(tmp_path / "row/seed2", [50, 66], seed=2, lr=0.3)
    status, _, err = command(evaluation, "--plot", tmp_path / "row")
    assert status == 2 and "row mixes runs of different lr" in err and err.count("\n") == 1


def test_a_folder_whose_name_is_no_text(tmp_path, write_run):
    try:
        folder = write_run(tmp_path / "a\udce9", [40, 60])
    except OSError:
        pytest.skip("the file system refuses the name")
    plot([folder, folder]).savefig(tmp_path / "curves.png")


def test_only_a_figure_of_plot_is_replaced(write_run, command, tmp_path):
    write_run(tmp_path / "run", [40, 60])
    assert command(evaluation, "--plot", "run", "--output", "mine.png")[1] == "drawn: mine.png\n"
    first = (tmp_path / "mine.png").read_bytes()
    write_run(tmp_path / "more", [50, 55])
    assert command(evaluation, "--plot", "run", "more", "--output", "mine.png")[0] == 0
    assert (tmp_path / "mine.png").read_bytes() != first and first[:4] == b"\x89PNG"
    # What train.py draws into a run folder, and what is no figure at all.
    plot(["run"]).savefig("curves.png")
    (tmp_path / "notes.png").write_text("mine")
    for name in ("curves.png", "notes.png"):
        before = (tmp_path / name).read_bytes()
        status, _, err = command(evaluation, "--plot", "run", "--output", name)
        assert status == 2 and err.startswith(f"eval.py: --output {name}: ") and "remove it" in err
        assert (tmp_path / name).read_bytes() == before
    assert command(evaluation, "--plot", "run")[0] == 2
    for name in ("curves", "missing/curves.png"):
        status, _, err = command(evaluation, "--plot", "run", "--output", name)
        assert status == 2 and name in err and err.count("\n") == 1
