"""Tables of runs: reading their logs, the statistics of a difference, and the Markdown.

A row of a table is an experiment, kept in a folder, with a run for each seed. In here it is
{seed: (config, epochs)}: config.json as a dict, and a dict for each line of metrics.jsonl.
Accuracies are in percent, their differences in percentage points.
"""
import json
import math
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.errors import UserError

# Settings that --resume takes beside a run's own, since they touch its numbers by rounding at most.
MAY_CHANGE_ON_RESUME = ("data_dir", "device", "cuda_graph", "compile")
# With the path of the teacher's file, whose weights are compared by their digest.
TOUCH_NO_NUMBER = (*MAY_CHANGE_ON_RESUME, "teacher_checkpoint")
# Settings in which the seeds of a row may differ.
MAY_CHANGE_WITH_SEED = {"seed", "amp", *TOUCH_NO_NUMBER}
# What rows must have in common to be compared. A row without a teacher goes with any teacher.
COMPARABLE = ("data set", "images", "image size", "measured part", "student", "epochs")
TEACHER = ("teacher", "teacher's weights")


# --- Reading runs ---------------------------------------------------------------------------------

def top1_of(config):
    """The key of the accuracy that a run measures: "test_top1" or "val_top1"."""
    return config["evaluate"] + "_top1"


def read_run(folder):
    """(config, epochs) of a run folder. Raises UserError where its files are not train.py's."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
        config["evaluate"] = config.get("evaluate") or "test"
        epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        words = [config.get(k) for k in ("dataset", "student", "teacher", "schedule", "evaluate")]
        counts = [config.get(k) for k in ("epochs", "gamma", "seed", "image_size")]
        numbers = [value for row in epochs for value in (row["epoch"], *row.values())]
        for values, kinds in ((words, (str, type(None))), (counts, (int, type(None))),
                              (numbers, (int, float))):
            if not all(isinstance(value, kinds) for value in values):
                raise ValueError("a value of the wrong type")
        accuracies = [row.get(top1_of(config), math.nan) for row in epochs]
        finite = all(map(math.isfinite, accuracies))
    except (OSError, ValueError, AttributeError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{folder}: needs a readable config.json and metrics.jsonl ({error})")
    if not epochs or not finite:
        raise UserError(f"{folder / 'metrics.jsonl'}: empty, or not written by train.py")
    return config, epochs


def is_finished(config, epochs):
    return len(epochs) == config.get("epochs", len(epochs))


def find_runs(folder):
    """[(row, run folder)] of the runs folder/<row>/<seed>, and of those that lie in folder/<row>
    itself, rows in alphabetical order, numbers in their names by size. Folders named teacher-… are
    left out: they hold the teachers that train.py keeps. Raises UserError where there is no run."""
    folder = Path(folder)
    runs = [path.parent.relative_to(folder) for path in folder.rglob("metrics.jsonl")]
    if Path() in runs:
        raise UserError(f"--table {folder}: is a run; give the folder that its row is in")
    if not runs:
        raise UserError(f"--table {folder}: no metrics.jsonl below it; train.py writes them")
    runs = [run for run in runs if not any(part.startswith("teacher-") for part in run.parts)]
    if not runs:
        raise UserError(f"--table {folder}: holds teachers only; train a student first")

    def in_order(run):
        words = re.split(r"(\d+(?:\.\d+)?)", str(run))
        return [float(word) if k % 2 else word for k, word in enumerate(words)]
    return [(str(run.parent if len(run.parts) > 1 else run), folder / run)
            for run in sorted(runs, key=in_order)]


def identity(run, config, epochs):
    """{what: value} of what decides with which rows a run may be compared; None is unknown, or no
    teacher. The digests of images and weights are those of env.json."""
    try:
        env = json.loads((run / "env.json").read_text("utf-8"))
        images, weights = env.get("data") and tuple(env["data"]), env.get("teacher_digest")
    except (OSError, ValueError, AttributeError, TypeError):
        images, weights = None, None
    values = (config.get("dataset"), images, config.get("image_size"), config["evaluate"],
              config.get("student"), len(epochs), config.get("teacher"), weights)
    return dict(zip(COMPARABLE + TEACHER, values))


def agree(a, b):
    """Whether two `identity`s may be compared. What is not known, or no teacher, goes with all."""
    return all(None in (a[what], b[what]) or a[what] == b[what] for what in a)


def merge(a, b):
    return {what: b[what] if a[what] is None else a[what] for what in a}


def make_rows(runs):
    """(rows, {row: its identity}) of [(row, run folder, config, epochs)]. Raises UserError for a
    row that mixes experiments, or has a seed twice."""
    rows, identities = {}, {}
    for name, run, config, epochs in runs:
        row, seed = rows.setdefault(name, {}), config.get("seed")
        if seed in row:
            raise UserError(f"{run} is a second run of seed {seed}; keep one")
        about = identity(run, config, epochs)
        known = identities.setdefault(name, about)
        different = [what for what in about if not agree({what: about[what]}, known)]
        for other, _ in row.values():
            if any(config.get(k) != other.get(k) for k in {*config, *other} - MAY_CHANGE_WITH_SEED):
                different.append("settings")
        if different:
            raise UserError(f"{run.parent} mixes runs of different {different[0]}; keep "
                            "the seeds of one experiment in a folder")
        identities[name], row[seed] = merge(known, about), (config, epochs)
    return rows, identities


def group_rows(runs):
    """[(what is common to its rows, rows)] of [(row, run folder, config, epochs)]: a group for each
    set of rows that may be compared. A row without a teacher is in the group of each teacher.
    Raises UserError as `make_rows` does."""
    rows, identities = make_rows(runs)
    groups = []
    # Rows with a teacher first, so that the others find all groups.
    for name in sorted(rows, key=lambda name: identities[name]["teacher"] is None):
        about = identities[name]
        fitting = [group for group in groups if agree(about, group[0])]
        if not fitting:
            groups.append([about, [name]])
        for group in fitting[:1] if about["teacher"] else fitting:
            group[:] = merge(group[0], about), [*group[1], name]
    groups = [(common, {name: rows[name] for name in rows if name in names})
              for common, names in groups]
    return sorted(groups, key=lambda group: [*rows].index([*group[1]][0]))


def read_rows(folder):
    """{row: {seed: (config, epochs)}} of the runs below `folder`, all of which may be compared.
    Raises UserError where a run is not finished, or rows may not be compared."""
    runs = [(name, run, *read_run(run)) for name, run in find_runs(folder)]
    for _, run, config, epochs in runs:
        if not is_finished(config, epochs):
            raise UserError(f"--table: {unfinished(run, config, epochs)}; go on with it, or take "
                            "it out")
    groups = group_rows(runs)
    if len(groups) > 1:
        largest = max(groups, key=lambda group: len(group[1]))
        common, rows = next(group for group in groups if group is not largest)
        what = next(what for what in common if not agree({what: common[what]}, largest[0]))
        raise UserError(f"--table {folder}: mixes rows of different {what}, which cannot be "
                        f"compared; the odd ones: {', '.join(rows)} ({in_words(common[what])})")
    return groups[0][1]


def unfinished(run, config, epochs):
    return f"{run} has {len(epochs)} of {config['epochs']} epochs"


def last_top1(row):
    """{seed: top-1 of the last epoch, %}."""
    return {seed: epochs[-1][top1_of(config)] for seed, (config, epochs) in row.items()}


# --- Statistics -----------------------------------------------------------------------------------

class Interval(NamedTuple):
    """A mean, the ends of its confidence interval, and p that the true mean is 0, by Student's t,
    two-sided. The last three are None for fewer than two numbers, the mean too for none."""
    mean: float = None
    low: float = None
    high: float = None
    p: float = None


def interval(numbers, confidence=0.95):
    """The Interval of a list of numbers that are independent of each other."""
    # Here, since it takes a second and train.py imports this file.
    from scipy import stats

    numbers = np.array(numbers, dtype=np.float64)
    # numpy and scipy warn of numbers that are equal, or all but equal.
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        if len(numbers) < 2:
            return Interval(*map(float, numbers))
        mean = float(numbers.mean())
        if numbers.std() == 0:
            return Interval(mean, mean, mean, float(mean == 0))
        test = stats.ttest_1samp(numbers, 0)
        return Interval(mean, *map(float, test.confidence_interval(confidence)), float(test.pvalue))


def difference(ours, theirs, confidence=0.95):
    """The Interval of `ours` minus `theirs`, {seed: number} each, seed by seed: a seed fixes the
    initial weights, the order of the images and the views, so the pairs differ by less than two
    runs of different seeds."""
    return interval([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())],
                    confidence)


def top1_difference(row, other, confidence=0.95):
    """The `difference` of the rows' last top-1, in points."""
    return difference(last_top1(row), last_top1(other), confidence)


def holm(intervals):
    """{name: p}, each corrected for the number of comparisons (Holm, 1979), of {name: Interval}.
    One without a p is left out."""
    p = {name: found.p for name, found in intervals.items() if found.p is not None}
    largest, corrected = 0, {}
    for k, name in enumerate(sorted(p, key=p.get)):
        corrected[name] = largest = max(largest, min(1, (len(p) - k) * p[name]))
    return corrected


# --- Markdown -------------------------------------------------------------------------------------

def markdown(head, lines):
    """A table of a list of headings and lists of cells."""
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|",
                      *("| " + " | ".join(cells) + " |" for cells in lines)])


def interval_cell(found, digits=2):
    """An Interval as "+1.00 (-0.50 to +2.50)", with what of it is known."""
    if found.mean is None:
        return "-"
    ends = f" ({found.low:+.{digits}f} to {found.high:+.{digits}f})" if found.p is not None else ""
    return f"{found.mean:+.{digits}f}{ends}"


def comparison_cells(intervals, digits):
    """{name: [difference, Holm's p]} of {name: Interval}, as the cells of a table."""
    p = holm(intervals)
    return {name: [interval_cell(found, digits), f"{p[name]:.2g}" if name in p else "-"]
            for name, found in intervals.items()}


def verdict_cell(found, corrected=None):
    """Better, worse or not known. corrected: Holm's p, which then decides instead of the interval.
    """
    if found.p is None:
        return "-" if found.mean is None else "one seed: not known"
    shown = found.low > 0 or found.high < 0 if corrected is None else corrected < 0.05
    verdict = ("better" if found.mean > 0 else "worse") if shown else "no difference shown"
    return verdict + ("" if corrected is None else f" (p = {corrected:.2g})")


def table(rows, against=None):
    """Markdown of rows that may be compared, each with the one above, or all with the row
    `against`; the verdicts are then corrected for their number."""
    config, _ = next(iter(next(iter(rows.values())).values()))
    part, key = config["evaluate"], top1_of(config)
    above = dict(zip([*rows][1:], rows))
    partner = {name: above.get(name) if against is None else against for name in rows}
    differences = {name: top1_difference(rows[name], rows[other])
                   for name, other in partner.items() if other not in (None, name)}
    p = holm(differences) if against is not None else {}
    lines = []
    for name, row in rows.items():
        config, epochs = next(iter(row.values()))
        last = np.array([*last_top1(row).values()], dtype=np.float64)
        best = [max(epoch[key] for epoch in epochs) for _, epochs in row.values()]
        spread = f" ± {last.std(ddof=1):.2f}" if len(row) > 1 else ""
        found = differences.get(name, Interval())
        lines.append([name, config["student"], str(len(epochs)), str(len(row)),
                      f"{last.mean():.2f}{spread}", f"{sum(best) / len(best):.2f}",
                      interval_cell(found), verdict_cell(found, p.get(name))])
    made = markdown(
        ["run", "student", "epochs", "n seeds", f"last epoch, {part} top-1 % (mean ± sd)",
         f"best epoch (mean; selected on {part})",
         f"difference to {against or 'the row above'} (95 % interval)",
         f"verdict{' (Holm)' if against else ''}"], lines)
    if p:
        # What Holm's first step asks for, which is the strictest.
        strict = [top1_difference(rows[name], rows[against], 1 - 0.05 / len(p)) for name in p]
        least = sorted(found.high - found.mean for found in strict)
        made += ("\n\nA difference that is smaller than this is not shown, in the median row: "
                 f"{least[len(least) // 2]:.1f} points.")
    return made


def in_words(value):
    """A setting, or a digest cut short, as it is read in a line."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(in_words, value))
    is_digest = re.fullmatch("[0-9a-f]{12,}", str(value))
    return f"{value:g}" if isinstance(value, float) else str(value)[:8 if is_digest else None]


def differing_settings(rows):
    """Markdown: a line for each row with those of its settings that not all rows share."""
    configs = {name: next(iter(row.values()))[0] for name, row in rows.items()}
    first, *others = configs.values()
    keys = [key for key in dict.fromkeys(key for config in configs.values() for key in config)
            if key not in MAY_CHANGE_WITH_SEED
            and any(config.get(key) != first.get(key) for config in others)]
    lines = [f"- {name}: " + ", ".join(f"{key} {in_words(config[key])}" for key in keys
                                       if config.get(key) is not None)
             for name, config in configs.items()]
    return "\n".join(["The settings in which the rows differ:", "", *lines]) if keys else ""


def tables(folder, against=None):
    """Markdown of all finished runs below `folder`: a table for each set of rows that may be
    compared, or only those that have the row `against`; then the settings in which its rows differ,
    and at the end the runs that are not finished. Raises UserError where a file is damaged, a row
    mixes experiments, or no row is called `against`."""
    runs = [(name, run, *read_run(run)) for name, run in find_runs(folder)]
    left_out = [f"Left out: {unfinished(run, config, epochs)}."
                for _, run, config, epochs in runs if not is_finished(config, epochs)]
    groups = group_rows([run for run in runs if is_finished(*run[2:])])
    if against is not None:
        names = [name for _, rows in groups for name in rows]
        groups = [group for group in groups if against in group[1]]
        if not groups:
            raise UserError(f"--against {against}: no such row in {folder}; choose among "
                            f"{', '.join(dict.fromkeys(names))}")
    several = [what for what in COMPARABLE + TEACHER
               if any(not agree({what: common[what]}, groups[0][0]) for common, _ in groups)]
    blocks = []
    for common, rows in groups:
        if several:
            blocks.append("**" + ", ".join(f"{what} {in_words(common[what])}" for what in several)
                          + "**")
        blocks += [table(rows, against), differing_settings(rows)]
    return "\n\n".join(block for block in [*blocks, "\n".join(left_out)] if block)
