"""Curves of runs, from their logs."""
import itertools
import math
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from support.errors import UserError
from support.tables import read_run

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
MADE_BY = {"Software": "eval.py --plot"}


def plot(folders):
    """Figure of the runs in `folders`, drawn over each other: the loss by term, top-1, and the
    share of rows whose top class is not the label. Marked are gamma, after which the student swap
    joins, and the drops of the learning rate. Raises UserError where a folder holds no run."""
    figure = Figure(figsize=(10, 3.4), dpi=120, layout="constrained")
    axes = figure.subplots(1, len(PANELS))
    styles = list(zip(map(Path, folders), itertools.cycle(("-", "--", ":", "-."))))
    for folder, style in styles:
        config, epochs = read_run(folder)
        for ax, (title, colours) in zip(axes, PANELS.items()):
            ax.set(xlabel="epoch", title=title)
            draw_curves(ax, epochs, colours, style)
            mark_changes(ax, config, epochs)
            ax.spines[["top", "right"]].set_visible(False)
            ax.xaxis.get_major_locator().set_params(integer=True)
            # Several runs give one entry for each label.
            entries = {line.get_label(): line for line in ax.lines}
            ax.legend(entries.values(), entries.keys(), frameon=False, fontsize=7)
    axes[0].set_yscale("log")
    if len(styles) > 1:
        lines = [Line2D([], [], color="grey", ls=style) for _, style in styles]
        figure.legend(lines, [str(folder) for folder, _ in styles], loc="outside lower center",
                      frameon=False, fontsize=7)
    return figure


def draw_curves(ax, epochs, colours, style):
    """One line for each key of `colours` that the run logs."""
    marker = "." if len(epochs) < 30 else ""
    for key, colour in colours.items():
        if any(key in row for row in epochs):
            ax.plot([row["epoch"] for row in epochs], [row.get(key, math.nan) for row in epochs],
                    style, marker=marker, color=colour, label=key)


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
    if path.exists():
        try:
            with Image.open(path) as old:
                own = old.info.get("Software") == MADE_BY["Software"]
        except Exception:
            # What is no image can raise nearly anything.
            own = False
        if not own:
            raise UserError(f"--output {path}: is there, and not from --plot; remove it, or give "
                            "another name")
    figure.savefig(path, metadata=MADE_BY)
