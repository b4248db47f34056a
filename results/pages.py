"""Bring README.md and results/README.md up to date with the logs:  python results/pages.py

Makes anew every table between <!-- KIND: FOLDER --> and <!-- end -->, as TABLES says, and the
figures.
"""
import contextlib
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from support.errors import UserError  # noqa: E402
from support.plots import BLUE  # noqa: E402
from support.tables import (  # noqa: E402
    comparison_cells,
    difference,
    holm,
    markdown,
    read_rows,
    table,
    top1_difference,
)

# The row that the ladder is compared with: KD with the views, temperatures and rate of SLD.
KD = "05-kd-both-T1to6"
# What the paper claims, and the two rows that differ in it.
CLAIMS = {
    "the teacher's wrong top-1 misleads": ("06-teacher-swap", KD),
    "swapping beats adding": ("06-teacher-swap", "07-GA-teacher"),
    "two teachers beat one": ("09-sld", "06-teacher-swap"),
    "the schedule helps": ("09-sld", "08-both-swaps"),
    "better than KD": ("09-sld", "03-kd-weak"),
    "better than KD on both views": ("09-sld", "04-kd-both"),
    "better than KD on both views at six temperatures": ("09-sld", KD),
    "better than DKD": ("09-sld", "16-dkd-both"),
    "better than RLD": ("09-sld", "17-rld-both"),
    "more than a larger weight of CE": ("06-teacher-swap", "14-kd-both-T1to6-more-ce"),
}


# --- Reading the files of a run -------------------------------------------------------------------

def mistakes_of(folder, key):
    """{row: {seed: teacher_errors_<key>, in % of the teacher's errors}} of final.json."""
    shares = {}
    for path in sorted(Path(folder).glob("*/*/final.json")):
        report = json.loads(path.read_text("utf-8"))
        seed = int(path.parent.name.removeprefix("seed"))
        shares.setdefault(path.parts[-3], {})[seed] = (
            100 * report[f"teacher_errors_{key}"] / max(1, report["teacher_errors"]))
    return shares


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


def claims_table(folder):
    """Markdown: the claims whose two rows are below `folder`, and their differences in top-1 and in
    the share of the teacher's errors that a student makes too, with Holm's p over the claims."""
    rows, made = read_rows(folder), mistakes_of(folder, "made")
    pairs = {claim: pair for claim, pair in CLAIMS.items() if {*pair} <= {*rows}}
    top1 = comparison_cells({claim: top1_difference(rows[a], rows[b])
                             for claim, (a, b) in pairs.items()}, 2)
    mistakes = comparison_cells({claim: difference(made[a], made[b])
                                 for claim, (a, b) in pairs.items()}, 1)
    return markdown(["claim", "rows", "top-1, points (95 % interval)", "p (Holm)",
                     "the teacher's mistakes made too, points (95 % interval)", "p (Holm)"],
                    [[claim, " minus ".join(pair), *top1[claim], *mistakes[claim]]
                     for claim, pair in pairs.items()])


TABLES = {"table": lambda folder, *against: table(read_rows(folder), *against),
          "mistakes": mistakes_table, "claims": claims_table}


def fill_tables():
    """Make anew the tables of both READMEs whose groups are whole."""
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
    for page in (ROOT / "README.md", ROOT / "results/README.md"):
        page.write_text(block.sub(fill, page.read_text("utf-8")), "utf-8")


# --- The figure -----------------------------------------------------------------------------------

def ladders():
    """{title: rows} of the ladders that have the row KD, and no run that was cut off."""
    found = {}
    for title, group in (("glyphs", "glyphs"), ("CIFAR-100", "cifar100")):
        with contextlib.suppress(UserError):
            rows = read_rows(ROOT / "results" / group)
            found |= {title: rows} if KD in rows else {}
    return found


# The rows of a ladder, in words.
WORDS = {
    "01-ce-weak": "student alone", "02-ce-both": "student alone, both views",
    "03-kd-weak": "KD, weak view", "04-kd-both": "KD, both views, T = 4",
    "06-teacher-swap": "SLD, no pseudo-teacher", "07-GA-teacher": "GA, no pseudo-teacher",
    "08-both-swaps": "SLD, γ = 0", "09-sld": "SLD", "10-sld-detached": "SLD, detached",
    "11-sld-weak": "SLD, weak view", "12-student-swap": "SLD, no teacher swap",
    "13-kd-both-weight-x6": "KD, both views, b = 5.4", "14-kd-both-T1to6-more-ce": "05 with a = 1",
    "16-dkd-both": "DKD", "17-rld-both": "RLD",
    "18-sld-standardized": "SLD, logits standardised",
    "19-kd-both-T1to6-standardized": "05, logits standardised",
}


def draw_differences(ladders):
    """Figure of the rows of each of the `ladders`, minus the row KD of the same: mean and 95 %
    interval; filled where Holm's p is below 0.05. A row stands at one height in all of them."""
    names = list(dict.fromkeys(n for rows in ladders.values() for n in rows if n != KD))
    figure = Figure(figsize=(9, 4.8), dpi=120, layout="constrained")
    axes = figure.subplots(1, len(ladders), squeeze=False, sharey=True)[0]
    for ax, (title, rows) in zip(axes, ladders.items()):
        differences = {name: top1_difference(rows[name], rows[KD]) for name in rows if name != KD}
        p = holm(differences)
        for name, found in differences.items():
            y, face = names.index(name), BLUE if p.get(name, 1) < 0.05 else "white"
            ax.plot([found.low, found.high], [y, y], color=BLUE)
            ax.plot(found.mean, y, "o", color=BLUE, markerfacecolor=face)
        ax.axvline(0, color="grey", lw=1)
        for y in range(0, len(names), 2):
            ax.axhspan(y - 0.5, y + 0.5, color="0.95", zorder=0)
        ax.set(title=title, yticks=range(len(names)), ylim=(len(names) - 0.5, -0.5),
               yticklabels=[WORDS.get(name, name) for name in names])
        ax.spines[["top", "right"]].set_visible(False)
    for face, word in ((BLUE, "differs from 05 also when corrected (Holm)"), ("white", "does not")):
        axes[0].plot([], [], "o", color=BLUE, markerfacecolor=face, label=word)
    figure.supxlabel("← worse | better → than KD on SLD's views (05), points of top-1")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def update():
    fill_tables()
    if found := ladders():
        draw_differences(found).savefig(ROOT / "results/differences.png")


if __name__ == "__main__":
    update()
