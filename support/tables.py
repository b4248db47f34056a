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
# images, teacher_digest: digests that env.json has of the images and of the teacher's weights.
COMPARABLE = ("dataset", "images", "image_size", "evaluate", "student", "epochs", "teacher",
              "teacher_digest")


# --- Reading runs ---------------------------------------------------------------------------------

def top1_of(config):
    """The key of the accuracy that a run measures: "test_top1" or "val_top1"."""
    return config["evaluate"] + "_top1"


def read_run(folder):
    """(config, epochs) of a run folder. Raises UserError where its files are not train.py's."""
    folder = Path(folder)
    try:
        # The oldest runs had no validation part.
        config = {"evaluate": "test"} | json.loads((folder / "config.json").read_text())
        epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        numbers = [config[k] for k in ("epochs", "gamma", "seed") if config.get(k) is not None]
        for row in epochs:
            numbers += [row["epoch"], row[top1_of(config)], *row.values()]
        if not epochs or not all(map(math.isfinite, numbers)):
            raise ValueError("metrics.jsonl: empty, or a number is not finite")
    except (OSError, ValueError, AttributeError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{folder}: needs config.json and metrics.jsonl as train.py writes them "
                        f"({error})")
    return config, epochs


def is_finished(config, epochs):
    return len(epochs) == config.get("epochs", len(epochs))


def find_runs(folder):
    """[(row, run folder)] of the runs folder/<row>/<seed>, and of those that lie in folder/<row>
    itself, rows in alphabetical order, numbers in their names by size. Folders named teacher-… are
    left out: they hold the teachers that train.py keeps. Raises UserError where there is no run."""
    folder = Path(folder)
    runs = [path.parent.relative_to(folder) for path in folder.rglob("metrics.jsonl")]
    runs = [run for run in runs if not any(part.startswith("teacher-") for part in run.parts)]
    if not runs:
        raise UserError(f"--table {folder}: no student's metrics.jsonl below it; train.py writes "
                        "them")

    def in_order(run):
        # Part by part, so that a folder comes before its numbered neighbours, x before x-2.
        words = [re.split(r"(\d+(?:\.\d+)?)", part) for part in run.parts]
        return [[float(word) if k % 2 else word for k, word in enumerate(part)] for part in words]
    return [(str(run.parent if len(run.parts) > 1 else run), folder / run)
            for run in sorted(runs, key=in_order)]


def settings_of(config):
    """{name: value} of the settings that the seeds of a row must share."""
    return {name: value for name, value in config.items()
            if value is not None and name not in MAY_CHANGE_WITH_SEED}


def digests_of(run):
    """The digests in a run folder's env.json. Raises UserError where that cannot be read."""
    try:
        env = json.loads((run / "env.json").read_text("utf-8"))
        return dict(images=env.get("data"), teacher_digest=str(env.get("teacher_digest"))[:12])
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{run}: needs env.json as train.py writes it ({error})")


def make_rows(runs):
    """(rows, {row: its values of COMPARABLE, in words}) of [(row, run folder, config, epochs)].
    Raises UserError for a row that mixes experiments, or has a seed twice."""
    rows, experiments = {}, {}
    for name, run, config, epochs in runs:
        row, seed = rows.setdefault(name, {}), config.get("seed")
        if seed in row:
            raise UserError(f"{run} is a second run of seed {seed}; keep one")
        mine = settings_of(config) | digests_of(run) | dict(epochs=len(epochs))
        known = experiments.setdefault(name, mine)
        different = [key for key in mine | known if mine.get(key) != known.get(key)]
        if different:
            raise UserError(f"{run.parent} mixes runs of different {different[0]}; keep "
                            "the seeds of one experiment in a folder")
        row[seed] = config, epochs
    return rows, {name: tuple(in_words(mine.get(key)) for key in COMPARABLE)
                  for name, mine in experiments.items()}


def read_groups(folder):
    """({values of COMPARABLE: rows}, [a line for each run that is not finished]) of the runs below
    `folder`: a group for each set of rows that may be compared. A row without a teacher is in the
    group of each teacher. Raises UserError where a file is damaged, or a row mixes experiments."""
    finished, unfinished, groups = [], [], {}
    for name, run in find_runs(folder):
        config, epochs = read_run(run)
        if is_finished(config, epochs):
            finished.append((name, run, config, epochs))
        else:
            unfinished.append(f"{run} has {len(epochs)} of {config['epochs']} epochs")
    rows, identities = make_rows(finished)
    for name, about in identities.items():
        taught = [other for other in identities.values()
                  if other[:-2] == about[:-2] and about[-2] == "None" != other[-2]]
        for group in taught or [about]:
            groups.setdefault(group, {})[name] = rows[name]
    return groups, unfinished


def differences_of(groups):
    """The positions in COMPARABLE at which the groups differ."""
    return [k for k in range(len(COMPARABLE)) if len({about[k] for about in groups}) > 1]


def read_rows(folder):
    """{row: {seed: (config, epochs)}} of the runs below `folder`, all of which may be compared.
    Raises UserError where a run is not finished, or rows may not be compared."""
    groups, unfinished = read_groups(folder)
    if unfinished:
        raise UserError(f"--table: {unfinished[0]}; go on with it, or take it out")
    if len(groups) > 1:
        largest = max(groups, key=lambda about: len(groups[about]))
        odd = next(about for about in groups if about != largest)
        k = differences_of([odd, largest])[0]
        raise UserError(f"--table {folder}: mixes rows of different {COMPARABLE[k]}, which cannot "
                        f"be compared; the odd ones: {', '.join(groups[odd])} ({odd[k]})")
    return next(iter(groups.values()))


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
                      *("| " + " | ".join(map(str, cells)) + " |" for cells in lines)])


def mean_and_sd(numbers):
    """{seed: number} as "82.58 ± 0.31", with the standard deviation of a sample."""
    numbers = [*numbers.values()]
    spread = f" ± {np.std(numbers, ddof=1):.2f}" if len(numbers) > 1 else ""
    return f"{np.mean(numbers):.2f}{spread}"


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
    """Better, worse or not known. corrected: Holm's p, which then decides instead of its own."""
    if found.p is None:
        return "-" if found.mean is None else "one seed: not known"
    shown = (found.p if corrected is None else corrected) < 0.05
    verdict = ("better" if found.mean > 0 else "worse") if shown else "no difference shown"
    return verdict + ("" if corrected is None else f" (p = {corrected:.2g})")


def table(rows, against=None):
    """Markdown of rows that may be compared, each with the one above, or all with the row
    `against`; the verdicts are then corrected for their number."""
    # Rows that may be compared have a part, a student and the number of epochs in common.
    config, epochs = next(iter(next(iter(rows.values())).values()))
    part, key = config["evaluate"], top1_of(config)
    partner = dict(zip([*rows][1:], rows)) if against is None else dict.fromkeys(rows, against)
    differences = {name: top1_difference(rows[name], rows[other])
                   for name, other in partner.items() if other != name}
    p = holm(differences) if against is not None else {}
    lines = []
    for name, row in rows.items():
        best = np.mean([max(epoch[key] for epoch in epochs) for _, epochs in row.values()])
        found = differences.get(name, Interval())
        lines.append([name, len(row), mean_and_sd(last_top1(row)), f"{best:.2f}",
                      interval_cell(found), verdict_cell(found, p.get(name))])
    made = f"{config['student']}, {len(epochs)} epoch{'s' * (len(epochs) > 1)}, {part} top-1 in %:"
    made += "\n\n" + markdown(
        ["run", "seeds", "last epoch (mean ± sd)", f"best epoch (mean; selected on {part})",
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
    """A setting, or several, as they are read in a line."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(in_words, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def differing_settings(rows):
    """Markdown: a line for each row with those of its settings that not all rows share."""
    settings = {name: settings_of(next(iter(row.values()))[0]) for name, row in rows.items()}
    first = next(iter(settings.values()))
    keys = [key for key in dict.fromkeys(key for mine in settings.values() for key in mine)
            if any(mine.get(key) != first.get(key) for mine in settings.values())]
    lines = [f"- {name}: " + ", ".join(f"{key} {in_words(mine[key])}" for key in keys
                                       if key in mine) for name, mine in settings.items()]
    return "\n".join(["The settings in which the rows differ:", "", *lines]) if keys else ""


def tables(folder, against=None):
    """Markdown of all finished runs below `folder`: a table for each set of rows that may be
    compared, or only those that have the row `against`; then the settings in which its rows differ,
    and at the end the runs that are not finished. Raises UserError where a file is damaged, a row
    mixes experiments, or no row is called `against`."""
    groups, unfinished = read_groups(folder)
    if against is not None:
        names = dict.fromkeys(name for rows in groups.values() for name in rows)
        if against not in names:
            raise UserError(f"--against {against}: no such row in {folder}; choose among "
                            f"{', '.join(names)}")
        groups = {about: rows for about, rows in groups.items() if against in rows}
    several, blocks = differences_of(groups), []
    for about, rows in groups.items():
        if several:
            blocks.append(f"**{', '.join(f'{COMPARABLE[k]} {about[k]}' for k in several)}**")
        blocks += [table(rows, against), differing_settings(rows)]
    blocks.append("\n".join(f"Left out: {run}." for run in unfinished))
    return "\n\n".join(filter(None, blocks))
