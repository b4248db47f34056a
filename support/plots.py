"""Curves of runs, from their logs."""
import itertools
import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from support.errors import UserError
from support.tables import make_rows, read_run

# Okabe and Ito's colours, which colour-blind readers can tell apart too.
BLUE, ORANGE, GREEN, BLACK = "#0072B2", "#E69F00", "#009E73", "#222222"
PURPLE = "#CC79A7"

# {title: {key of metrics.jsonl: colour}}. A colour means the same in all runs of a figure.
PANELS = {
    "weighted loss": {"loss_ce": GREEN, "loss_teacher": BLUE, "loss_student": ORANGE,
                      "loss_batch": BLACK, "loss_class": PURPLE},
    "top-1, %": {"train_top1": BLACK, "val_top1": BLUE, "test_top1": BLUE},
    "rows swapped, %": {"swap_teacher_weak": BLUE, "swap_teacher_strong": BLACK,
                        "swap_student": ORANGE},
}

# Written into the PNG, so that a later --plot knows a file of its own.
MADE_BY = "eval.py --plot"


def plot(folders):
    """Figure of the runs in `folders`, drawn over each other: the loss by term, top-1, and the
    share of rows whose top class is not the label. A folder of several seeds is drawn as their
    mean, in a band from the lowest to the highest. Marked are gamma, after which the student swap
    joins, and the drops of the learning rate. Raises UserError where a folder holds no run, or
    runs of different experiments."""
    figure = Figure(figsize=(10, 3.4), dpi=120, layout="constrained")
    axes = figure.subplots(1, len(PANELS))
    lines = []
    for folder, style in zip(map(Path, folders), itertools.cycle(("-", "--", ":", "-."))):
        runs = read_seeds(folder)
        seeds = f", mean of {len(runs)} seeds" if len(runs) > 1 else ""
        # matplotlib takes no name that is not Unicode.
        name = f"{folder}{seeds}".encode(errors="backslashreplace").decode()
        lines.append(Line2D([], [], color="grey", ls=style, label=name))
        for ax, (title, colours) in zip(axes, PANELS.items()):
            ax.set(xlabel="epoch", title=title)
            draw_curves(ax, [epochs for _, epochs in runs], colours, style)
            mark_changes(ax, *runs[0])
            ax.spines[["top", "right"]].set_visible(False)
            ax.xaxis.get_major_locator().set_params(integer=True)
            # Several runs give one entry for each label.
            entries = {line.get_label(): line for line in ax.lines}
            ax.legend(entries.values(), entries.keys(), frameon=False, fontsize=7)
    axes[0].set_yscale("log")
    if len(lines) > 1:
        figure.legend(handles=lines, loc="outside lower center", frameon=False, fontsize=7)
    return figure


def read_seeds(folder):
    """[(config, epochs)] of the run in `folder`, or of the seeds of one experiment below it, up to
    the last epoch of the shortest."""
    seeds = sorted(path.parent for path in folder.glob("*/metrics.jsonl"))
    if (folder / "metrics.jsonl").exists() or not seeds:
        return [read_run(folder)]
    runs = [read_run(seed) for seed in seeds]
    n = min(len(epochs) for _, epochs in runs)
    rows, _ = make_rows([("", seed, config, epochs[:n])
                         for seed, (config, epochs) in zip(seeds, runs)])
    return [*rows[""].values()]


def draw_curves(ax, runs, colours, style):
    """One line for each key of `colours` that the runs, all equally long, log."""
    epochs = [*zip(*runs)]
    marker = "." if len(epochs) < 30 else ""
    for key, colour in colours.items():
        values = np.array([[row.get(key, math.nan) for row in rows] for rows in epochs])
        if not np.isnan(values).all():
            x = [rows[0]["epoch"] for rows in epochs]
            ax.plot(x, values.mean(1), style, marker=marker, color=colour, label=key)
            if len(runs) > 1:
                ax.fill_between(x, values.min(1), values.max(1), color=colour, alpha=0.2, lw=0)


def mark_changes(ax, config, epochs):
    """Vertical lines after epoch gamma, and where the step schedule lowers the learning rate."""
    gamma = config.get("gamma")
    if gamma is not None and gamma < len(epochs):
        ax.axvline(gamma + 0.5, color=ORANGE, lw=4, alpha=0.3, label="γ")
    if config.get("schedule") != "step":
        return
    for before, after in zip(epochs, epochs[1:]):
        if after.get("lr", math.nan) < 0.5 * before.get("lr", math.nan):
            ax.axvline(after["epoch"] - 0.5, color="grey", ls=":", lw=1,
                       label="learning rate falls")


def save(figure, path):
    """Write a figure as a PNG file. Raises UserError where `path` is another kind of file, or one
    that this function did not write."""
    path = Path(path)
    if path.suffix != ".png":
        raise UserError(f"--output {path}: a PNG file is written; let its name end with .png")
    if path.exists() and MADE_BY.encode() not in path.read_bytes():
        raise UserError(f"--output {path}: is there, and not from --plot; remove it, or give "
                        "another name")
    figure.savefig(path, metadata={"Software": MADE_BY})
