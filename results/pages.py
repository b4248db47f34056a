"""Bring README.md and the pages below results/ up to date with the logs:  python results/pages.py

Makes anew every table between <!-- KIND: FOLDER --> and <!-- end -->, as TABLES says, and the
figures.
"""
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from scipy import optimize, stats  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from models import create_model  # noqa: E402
from support.errors import UserError  # noqa: E402
from support.plots import BLUE  # noqa: E402
from support.tables import (  # noqa: E402
    Interval,
    comparison_cells,
    difference,
    interval_cell,
    last_top1,
    markdown,
    mean_and_sd,
    read_rows,
    read_run,
    table,
)

# The rows of the ladder of 18 epochs, in the order of its table, in words.
ROWS = {
    "student-alone": "student alone", "student-alone-both": "student alone, both views",
    "kd": "KD, weak view", "kd-both": "KD, both views, T = 4",
    "sld-without-swaps": "SLD without its swaps", "more-ce": "… with more CE instead",
    # Validation images did not tell these apart from 0.3, which more-ce has.
    "more-ce-1": "… with a CE weight of 1", "more-ce-3": "… with a CE weight of 3",
    "mask": "… without KL where the teacher errs", "add-wrong": "… with GA where it errs",
    "sort": "… with the label sorted to the first rank",
    # Not "teacher-swap": --table leaves folders called teacher-… out, as those of teachers.
    "only-teacher-swap": "… with the teacher swap",
    "student-swap": "… with the student swap", "sld": "SLD",
    "sld-from-epoch-1": "SLD, both swaps from epoch 1", "sld-detached": "SLD, --detach",
    "sld-standardized": "SLD, --standardize", "dkd": "DKD, both views",
    "rld": "RLD, both views", "mlkd": "MLKD",
}
# Those of them that the README shows.
SUMMARY = ("student-alone", "student-alone-both", "kd", "kd-both", "sld-without-swaps", "more-ce",
           "only-teacher-swap", "sld")
# Those of them that CIFAR-100 has too.
ON_CIFAR = tuple(row for row in SUMMARY if row != "student-alone-both")
# The questions that the ladder was made to answer, declared before it was run: (row, other row).
# kd-both and sld-without-swaps: the better of them on validation images is the KD of the second.
CONTRASTS = {
    "Does the teacher swap help?": ("only-teacher-swap", "sld-without-swaps"),
    "Does SLD beat KD on both views?": ("sld", "kd-both"),
    "Does the swap beat a larger weight of CE?": ("only-teacher-swap", "more-ce"),
}
# Teachers of different quality: what they are, and the folder of the students that they taught.
OTHER_EPOCHS = 2, 3, 36
TEACHERS = {"12 epochs": "results/glyphs/ladder"} | {
    f"{n} epochs": f"results/glyphs/teachers-by-error/{n}-epochs" for n in OTHER_EPOCHS}
NO_CORRECTION = "sld-without-swaps"
# What is compared with it, for each of them, and its colour in the figure.
GAINS = {"mask": "tab:green", "only-teacher-swap": BLUE, "more-ce-1": "tab:pink",
         "more-ce-3": "tab:red", "sld": "tab:orange", "student-alone-both": "grey"}


# --- Reading the files of a run -------------------------------------------------------------------

def final_of(folder, number):
    """{row: {seed: number(report)}} of the reports final.json below `folder`."""
    found = {}
    for path in sorted(Path(folder).glob("*/*/final.json")):
        seed = int(path.parent.name.removeprefix("seed"))
        found.setdefault(path.parts[-3], {})[seed] = number(json.loads(path.read_text("utf-8")))
    return found


def mistakes_of(folder, key):
    """{row: {seed: teacher_errors_<key>, in % of the teacher's errors}} of final.json."""
    return final_of(folder, lambda report: 100 * report[f"teacher_errors_{key}"]
                    / max(1, report["teacher_errors"]))


def top1_of(folder):
    """{row: {seed: top-1 in %}} of final.json: of glyphs, on 50,000 fresh images."""
    return final_of(folder, lambda report: report["top1"])


# --- The tables -----------------------------------------------------------------------------------

def mistakes_table(folder, against):
    """Markdown: what the rows below `folder` make of the teacher's errors, and the difference to
    the row `against`, with Holm's p over the rows."""
    made, avoided = mistakes_of(folder, "made"), mistakes_of(folder, "avoided")
    lines = {row: [row, len(made[row])] for row in made}
    for shares in (made, avoided):
        cells = comparison_cells({row: difference(shares[row], shares[against])
                                  for row in shares if row != against}, 1)
        for row, line in lines.items():
            line += [f"{np.mean([*shares[row].values()]):.1f}", *cells.get(row, "--")]
    compared = [f"difference to {against} (95 % interval)", "p (Holm)"]
    return markdown(["run", "n", "the teacher's answer too, %", *compared, "right instead, %",
                     *compared], lines.values())


def grid_table(folder):
    """Markdown: top-1 of the last epoch of each row below `folder`."""
    return markdown(["row", "seeds", "top-1 of the last epoch, %"],
                    [[name, len(row), mean_and_sd(last_top1(row))]
                     for name, row in read_rows(folder).items()])


def ladder_table(folder, against):
    """Markdown: the rows below `folder` that have as many seeds as the row `against`, by
    final.json, and their differences to it."""
    top1, nll = top1_of(folder), final_of(folder, lambda report: report["nll"])
    shares = [mistakes_of(folder, key) for key in ("made", "avoided")]
    order = [row for row in ROWS if len(top1.get(row, ())) == len(top1[against])]
    return markdown(
        ["row", "seeds", "top-1, % (mean ± sd)", f"minus {against}, points (95 % interval)",
         "NLL", "the teacher's errors: its answer too, %", "right instead, %"],
        [[row, len(top1[row]), mean_and_sd(top1[row]),
          "-" if row == against else interval_cell(difference(top1[row], top1[against])),
          f"{np.mean([*nll[row].values()]):.3f}",
          *(f"{np.mean([*share[row].values()]):.1f}" for share in shares)] for row in order])


def cost_of_step(config):
    """Multiply-adds of a training step, as a multiple of those of the student alone on one view,
    where the backward pass counts as two forward ones."""
    adds = {}
    for role in ("student", "teacher"):
        with FlopCounterMode(display=False) as counter:
            if config[role]:
                create_model(config[role], 47)(torch.zeros(2, 3, 32, 32))
        adds[role] = counter.get_total_flops()
    views = 2 if config["views"] == "both" else 1
    return views * (1 + adds["teacher"] / (3 * adds["student"]))


def narrow(table):
    """A table as the README has it: without the spaces that would count as words."""
    return re.sub(" *([|±]) *", r"\1", table)


def summary_table(folder):
    """Markdown: the teacher and the rows of SUMMARY in words, of the ladder below `folder` and of
    CIFAR-100's, by final.json."""
    on_cifar = ROOT / "results/cifar100/ladder"
    top1, cifar = top1_of(folder), top1_of(on_cifar)
    teachers = [final_of(group, lambda report: report["teacher_top1"])["sld"][0]
                for group in (folder, on_cifar)]
    configs = {row: next(iter(by_seed.values()))[0] for row, by_seed in read_rows(folder).items()}
    shares = [mistakes_of(folder, key) for key in ("made", "avoided")]
    lines = [[ROWS[row], f"{cost_of_step(configs[row]):.1f}", mean_and_sd(top1[row]),
              mean_and_sd(cifar[row]) if row in ON_CIFAR else "",
              "/".join(f"{np.mean([*share[row].values()]):.0f}" for share in shares)]
             for row in SUMMARY]
    return narrow(markdown(
        ["training", "cost of a step", "glyphs", "CIFAR-100", "teacher's errors repeated/right, %"],
        [["teacher", "", *(f"{theirs:.2f}" for theirs in teachers), ""], *lines]))


def could_be_seen(found, n):
    """The true difference that would be shown (its 95 % interval without 0) in 80 % of experiments
    with n pairs, at least 3, and the noise of `found`: of Student's t, noncentral."""
    limit = stats.t.ppf(0.975, n - 1)
    in_errors = optimize.brentq(lambda d: stats.nct.sf(limit, n - 1, d) - 0.8, limit, 2 * limit)
    return in_errors * (found.high - found.mean) / limit


def contrasts_table(folder):
    """Markdown: the CONTRASTS by final.json, and how small a difference could have been seen."""
    top1 = top1_of(folder)
    lines = []
    for question, (ours, theirs) in CONTRASTS.items():
        found = difference(top1[ours], top1[theirs])
        lines.append([question, f"{ours} minus {theirs}", interval_cell(found), f"{found.p:.2g}",
                      f"{could_be_seen(found, len(top1[ours])):.2f}"])
    return markdown(["question", "rows", "points (95 % interval)", "p",
                     "would be seen 4 times in 5, points"], lines)


def gains_by_teacher():
    """[(teacher, its top-1 %, % of the weak and of the strong training views that it misreads,
    {row: {seed: top-1 %}}, {row: Interval of the row minus NO_CORRECTION, points})] of the
    TEACHERS, those that err least first."""
    found = []
    for teacher, folder in TEACHERS.items():
        top1 = top1_of(ROOT / folder)
        # Not begun, or not far enough.
        if not {"sld", NO_CORRECTION} <= {*top1}:
            continue
        logs = [read_run(run)[1] for run in sorted((ROOT / folder / "sld").glob("*"))]
        wrong = [np.mean([epoch[f"swap_teacher_{view}"] for log in logs for epoch in log])
                 for view in ("weak", "strong")]
        theirs = final_of(ROOT / folder, lambda report: report["teacher_top1"])["sld"]
        # The ladder's student alone had no teacher, so it goes with any. Other rows do not.
        rows = top1 | {row: by_seed for row, by_seed in top1_of(ROOT / "results/glyphs/ladder")
                       .items() if row == "student-alone-both"}
        found.append((teacher, np.mean([*theirs.values()]), wrong, rows,
                      {row: difference(rows[row], rows[NO_CORRECTION])
                       for row in GAINS if row in rows}))
    return sorted(found, key=lambda line: line[2])


def gains_table():
    """Markdown: `gains_by_teacher`."""
    return markdown(
        ["teacher", "seeds", "its top-1, %", "views that it misreads, weak/strong, %",
         f"{NO_CORRECTION}, top-1 %", *(f"{row}, points more" for row in GAINS)],
        [[teacher, len(none := [*top1[NO_CORRECTION].values()]), f"{theirs:.2f}",
          "/".join(f"{share:.1f}" for share in wrong), f"{np.mean(none):.2f}",
          *(interval_cell(gains.get(row, Interval())) for row in GAINS)]
         for teacher, theirs, wrong, top1, gains in gains_by_teacher()])


TABLES = {"summary": summary_table, "ladder": ladder_table, "contrasts": contrasts_table,
          "gains": lambda folder: gains_table(),
          "table": lambda folder, *against: table(read_rows(folder), *against),
          "mistakes": mistakes_table, "grid": grid_table}


def fill_tables():
    """Make anew the tables, of README.md and of the pages here, whose groups are whole."""
    def fill(match):
        kind, what = match.groups()
        folder, *against = what.split(" against ")
        try:
            made = TABLES[kind](ROOT / folder, *against)
        except (UserError, KeyError) as error:
            print(f"table left as it is: {error}")
            return match[0]
        return f"<!-- {kind}: {what} -->\n{made}\n<!-- end -->"

    block = re.compile(rf"<!-- ({'|'.join(TABLES)}): (.*?) -->\n.*?<!-- end -->", re.S)
    for page in (ROOT / "README.md", *sorted((ROOT / "results").rglob("README.md"))):
        page.write_text(block.sub(fill, page.read_text("utf-8")), "utf-8")


# --- The figure -----------------------------------------------------------------------------------

def draw_gains(found):
    """Figure of `gains_by_teacher`, a line for each row: its top-1, and its gain with 95 %
    intervals, logarithmic where it is larger than a point."""
    figure = Figure(figsize=(10, 4.5), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    right.set_yscale("symlog", linthresh=1)
    for k, (row, colour) in enumerate({NO_CORRECTION: "black", **GAINS}.items()):
        here = [(weak, np.mean([*top1[row].values()]), gains.get(row))
                for _, _, (weak, _), top1, gains in found if row in top1]
        left.plot([x for x, _, _ in here], [top1 for _, top1, _ in here], "o-", color=colour,
                  label=ROWS[row])
        if row == NO_CORRECTION:
            continue
        # Side by side, for the intervals to be seen.
        here = [(x + 0.5 * (k - len(GAINS) / 2), gain) for x, _, gain in here]
        right.plot([x for x, _ in here], [gain.mean for _, gain in here], "o-", color=colour)
        for x, gain in here:
            right.plot([x, x], [gain.low, gain.high], color=colour)
    right.axhline(0, color="black")
    left.set_title("top-1, %", fontsize="medium")
    right.set_title("points above SLD without its swaps (logarithmic beyond 1)", fontsize="medium")
    ticks = [-1, -0.5, 0, 0.5, 1, 2, 5, 10, 20, 50]
    right.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    for ax in (left, right):
        ax.set_xlabel("weak training views that the teacher misreads, %")
        ax.spines[["top", "right"]].set_visible(False)
    right.legend(*left.get_legend_handles_labels(), loc="lower right", framealpha=1,
                 edgecolor="white")
    return figure


def update():
    fill_tables()
    if len(found := gains_by_teacher()) > 1:
        draw_gains(found).savefig(ROOT / "results/gains.png")


if __name__ == "__main__":
    update()
