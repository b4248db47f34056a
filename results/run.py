"""Make the runs behind the tables:  python results/run.py GROUP [--jobs 2] [--rows ROW …]

A run that is there is left alone, one that was cut off goes on, a teacher that is missing comes
first. Each runs on one thread of the CPU and in float32, but for the rows that say otherwise, so
that its numbers do not depend on --jobs, a GPU or a processor's bfloat16. Logs go to
results/GROUP/<row>/seed<k>; weights stay beside them, out of git.
A teacher's logits are kept in runs/logits, since rows of one seed and the same views need the same.
A ladder's students are counted against the teacher's mistakes, into mistakes.json beside each log.
Then the tables of both READMEs and results/differences.png are made anew from all logs here.
"""
import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

import eval as evaluation  # noqa: E402
import train  # noqa: E402
from support.files import atomic_write  # noqa: E402
from train import FINE_TUNING, TUNED  # noqa: E402

TEACHER = "--teacher-checkpoint results/teachers/{}/seed0/last.pt"
# The teacher of the default experiment, as train.py trains it by itself.
ALONE = "--method ce --student resnet14 --epochs 12 --lr 0.2"
GRID = {"ce": (0.2, 0.4, 0.8), "kd": (0.1, 0.2, 0.4, 0.8), "sld": (0.05, 0.1, 0.2)}
VIT_GRID = dict.fromkeys(("ce", "kd", "sld"), (0.0005, 0.001, 0.002, 0.004, 0.008))


# The ladder: one thing changes at a time.
SIX = "--method kd --views both --temperatures 1 2 3 4 5 6"
# Chosen on validation images: results/tuning-omega, results/tuning-ce-weight.
OMEGA, CE_WEIGHT = 1, 1
LADDER = {
    "01-ce-weak": "--method ce", "02-ce-both": "--method ce --views both",
    "03-kd-weak": "--method kd", "04-kd-both": "--method kd --views both",
    "05-kd-both-T1to6": SIX, "06-teacher-swap": "--method sld --no-student-swap",
    "07-GA-teacher": f"--method sld --no-student-swap --teacher-fix add --omega {OMEGA}",
    "08-both-swaps": "--method sld --gamma 0", "09-sld": "--method sld",
    "10-sld-detached": "--method sld --detach", "11-sld-weak": "--method sld --views weak",
    "12-student-swap": "--method sld --teacher-fix none",
    "13-kd-both-weight-x6": "--method kd --views both --kd-weight 5.4",
    "14-kd-both-T1to6-more-ce": f"{SIX} --ce-weight {CE_WEIGHT}",
    "15-teacher-swap-strong": "--method sld --no-student-swap --teacher-fix swap-strong",
    "16-dkd-both": "--method dkd --views both", "17-rld-both": "--method rld --views both",
    "18-sld-standardized": "--method sld --standardize",
    "19-kd-both-T1to6-standardized": f"{SIX} --standardize"}


# As train.py has them by default.
DEFAULTS = ("01-ce-weak", "03-kd-weak", "09-sld")
VIT_LADDER = ("01-ce-weak", "03-kd-weak", "05-kd-both-T1to6", "06-teacher-swap", "09-sld",
              "14-kd-both-T1to6-more-ce")
CIFAR_LADDER = (*VIT_LADDER, "16-dkd-both", "17-rld-both")
# Chosen on validation images of glyphs, for its networks: TUNED in train.py.
RATES = TUNED["sgd"]["lr"]
# In bfloat16, which is 1.7 times as fast where a processor has it.
CIFAR = ("--amp --dataset cifar100 --data-dir data/cifar100 --student resnet8 --epochs 15 "
         "--schedule cosine --warmup 1.5")
CIFAR_TEACHER = "--teacher resnet20 --teacher-checkpoint data/cifar100_resnet20.pth"


def family(flags):
    """The method whose rate a row takes. Six temperatures are six times the weight, hence sld's."""
    six = "--temperatures" in flags or "--kd-weight" in flags
    return "sld" if six else flags.split()[1]


def taught(flags, teacher, rates=RATES):
    flags = f"{flags} --lr {rates[family(flags)]:g}"
    return flags if "--method ce" in flags else f"{flags} {teacher}"


def ladder(teacher, rows=LADDER, more="", rates=RATES):
    return {row: f"{taught(LADDER[row], teacher, rates)} {more}" for row in rows}


def grid(lrs, more=""):
    teacher = TEACHER.format("glyphs-val")
    return {f"{method}-lr{lr:g}":
            f"{taught(f'--method {method}', teacher, {method: lr})} {more} --evaluate val"
            for method in lrs for lr in lrs[method]}


def variants(flags, name, values):
    return {f"{name.strip('-')}{v:g}":
            f"{taught(flags, TEACHER.format('glyphs-val'))} {name} {v:g} --evaluate val"
            for v in values}


# Fine-tuning, from ImageNet weights in torch's cache, on sets put there by hand: results/README.md.
PHOTOGRAPHS = "--dataset folder --data-dir data/{} --image-size 64 --evaluate val"
PHOTOGRAPHS_TEACHERS = {
    f"{name}-val": f"--method ce --student mobilenet_v3_small {PHOTOGRAPHS.format(name)} --lr 0.01"
    for name in ("set-a", "set-b")}


BEST = FINE_TUNING["sgd"]["lr"]


def fine_tuning(name, more="", best=None):
    """A grid of rates, of which sld's goes lower, or only the rates {method: rate}."""
    teacher = f"--teacher mobilenet_v3_small {TEACHER.format(name + '-val')}"
    common = f"--student shufflenet_v2_x0_5 {PHOTOGRAPHS.format(name)}"
    rates = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
    return {f"{method}-lr{lr:g}":
            f"{taught(f'--method {method}', teacher, {method: lr})} {common} {more}"
            for method in ("ce", "kd", "sld") for lr in rates
            if (lr == best[method] if best else lr > 0.001 or method == "sld")}


PUBLISHED_TEACHER = "--teacher resnet56 --teacher-checkpoint data/cifar100_resnet56.pth"
PUBLISHED = {"ce": "--method ce", "kd": "--method kd", "sld": "--method sld",
             "sld-without-swaps": f"{SIX} --lr 0.025"}


# group: (its rows, each with flags of train.py; the seeds)
GROUPS = {
    "glyphs": (ladder(TEACHER.format("glyphs")), range(5)),
    "glyphs-vit": (ladder(TEACHER.format("glyphs"), VIT_LADDER, "--student vit_nano",
                          TUNED["adamw"]["lr"]), range(5)),
    # Public teachers, put there by hand: results/README.md.
    "cifar100": (ladder(CIFAR_TEACHER, CIFAR_LADDER, CIFAR), range(3)),
    # The rate of KD before the one that glyphs' images chose.
    "cifar100-kd-rate": ({"kd-lr0.2": f"--method kd --lr 0.2 {CIFAR_TEACHER} {CIFAR}"}, range(3)),
    "cifar100-strong": (ladder("--teacher resnet56 --teacher-checkpoint "
                               "data/cifar100_resnet56.pth",
                               ("05-kd-both-T1to6", "06-teacher-swap", "09-sld"), CIFAR), range(3)),
    "tuning-dkd": (variants(LADDER["16-dkd-both"], "--lr", (0.025, 0.05, 0.1, 0.2, 0.4)), range(1)),
    "tuning-rld": (variants(LADDER["17-rld-both"], "--lr", (0.0125, 0.025, 0.05, 0.1, 0.2)),
                   range(1)),
    "tuning-omega": (variants(LADDER["07-GA-teacher"], "--omega", (0.5, 1, 2, 4, 8)), range(2)),
    "tuning-ce-weight": (variants(SIX, "--ce-weight", (0.1, 0.3, 1, 3, 10)), range(2)),
    "teachers": ({"glyphs": ALONE, "glyphs-val": f"{ALONE} --evaluate val",
                  "glyphs-vit": "--method ce --student vit_nano --views both --epochs 64 "
                                "--lr 0.001"},
                 range(1)),
    "stability": ({f"{name}-{n}-thread": f"{ALONE} {flag}"
                   for name, flag in (("float32", ""), ("bfloat16", "--amp"))
                   for n in (1, 2)}, range(3)),
    "tuning": (grid(GRID), range(5)),
    # The rate of 0.2 is teachers/glyphs-val.
    "tuning-teacher": ({f"resnet14-lr{lr:g}": f"{ALONE} --evaluate val --lr {lr:g}"
                        for lr in (0.1, 0.4)}, range(1)),
    "tuning-vit": (grid(VIT_GRID, "--student vit_nano"), range(2)),
    "tuning-set-a": (fine_tuning("set-a"), range(1)),
    "tuning-set-b": (fine_tuning("set-b"), range(1)),
    # The best rates again, at twice the epochs.
    "tuning-set-a-twice": (fine_tuning("set-a", "--epochs 20", BEST), range(1)),
    "tuning-set-b-twice": (fine_tuning("set-b", "--epochs 20", BEST), range(1)),
    "glyphs-twice": (ladder(TEACHER.format("glyphs"), DEFAULTS, "--epochs 18"), range(5)),
    # The published recipe as it stands, 240 epochs, in bfloat16.
    "published": ({row: f"--amp --dataset cifar100 --data-dir data/cifar100 --student resnet20 "
                        f"{flags} {PUBLISHED_TEACHER * (row != 'ce')}"
                   for row, flags in PUBLISHED.items()}, range(1)),
    # A ViT as the teacher.
    "vit-teacher": (ladder(f"--teacher vit_nano {TEACHER.format('glyphs-vit')}", DEFAULTS[1:]),
                    range(3)),
}
# Groups of which the teacher's mistakes are counted.
MISTAKES = ("glyphs", "glyphs-vit", "cifar100", "cifar100-strong")


def shared(teacher, folder):
    """`teacher`, which looks for its logits in `folder` before it computes them, and leaves them
    there. They are found by the very bytes of the images, so a log is the same to the bit."""
    compute = teacher.forward

    def forward(images):
        pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
        file = folder / f"{hashlib.sha1(pixels).hexdigest()}.npy"
        if file.exists():
            return torch.from_numpy(np.load(file))
        logits = compute(images)
        with atomic_write(file) as whole:
            np.save(whole, logits.float().numpy())
        return logits

    folder.mkdir(parents=True, exist_ok=True)
    teacher.forward = forward
    return teacher


def train_shared():
    """train.py, with the flags that follow, and a teacher that is `shared`."""
    own = train.get_teacher

    def get_teacher(s, *args):
        teacher, digest = own(s, *args)
        return shared(teacher, ROOT / "runs/logits" / f"{digest}{'-amp' * s.amp}"), digest

    train.get_teacher = get_teacher
    del sys.argv[1]
    train.main()


def is_whole(folder):
    config, rows = evaluation.read_run(folder)
    return len(rows) == config["epochs"]


def make(folder, flags, seed):
    threads = "2" if folder.endswith("2-thread") else "1"
    folder, logs = f"{folder}/seed{seed}", f"{folder}/seed{seed}"
    if (ROOT / folder / "metrics.jsonl").exists() and is_whole(ROOT / folder):
        # A teacher's weights are needed, of the others the logs are enough.
        if not folder.startswith("results/teachers/") or (ROOT / folder / "last.pt").exists():
            print(f"{folder}: is there", flush=True)
            return 0
        # Not in git: made again, elsewhere, and put beside their logs.
        folder = f"runs/{folder.replace('/', '-')}"
    start = ["--device", "cpu", "--no-amp", *flags.split(), "--seed", str(seed)]
    if (ROOT / folder / "config.json").exists():
        start = ["--resume"]
    with open(ROOT / "runs" / f"{folder}.out".replace("/", "-"), "w") as out:
        done = subprocess.run([sys.executable, __file__, "train", *start, "--run-dir", folder],
                              cwd=ROOT, stdout=out, stderr=subprocess.STDOUT,
                              env=os.environ | dict(OMP_NUM_THREADS=threads))
    if done.returncode == 0 and folder != logs:
        shutil.copy(ROOT / folder / "last.pt", ROOT / logs)
    result = "done" if done.returncode == 0 else f"status {done.returncode}, see {out.name}"
    print(f"{folder}: {result}", flush=True)
    return done.returncode


def count_mistakes(folder):
    """mistakes.json beside each whole log below `folder` whose weights are here: `eval.inheritance`
    on the test images, of each student, also of one alone, and the teacher of the others."""
    runs = [path.parent for path in sorted(folder.glob("*/*/last.pt")) if is_whole(path.parent)]
    configs = [evaluation.read_run(run)[0] for run in runs]
    taught = next((config for config in configs if config["teacher_checkpoint"]), None)
    if taught is None:
        return
    data = train.load(taught["dataset"], ROOT / taught["data_dir"], taught["image_size"],
                      train=False)

    def logits_of(path, name=None):
        model, _ = evaluation.load_model(path, name, data)
        return evaluation.predict(model, data.test[0], data.mean, data.std)

    teacher = logits_of(ROOT / taught["teacher_checkpoint"], taught["teacher"])
    for run in runs:
        if not (run / "mistakes.json").exists():
            report = evaluation.inheritance(logits_of(run / "last.pt"), teacher, data.test[1])
            train.write_json(run / "mistakes.json", report)


def shares_of(folder, key):
    """{row: {seed: teacher_errors_<key>, in % of the teacher's errors}} of mistakes.json."""
    shares = {}
    for path in sorted(Path(folder).glob("*/*/mistakes.json")):
        report = json.loads(path.read_text("utf-8"))
        seed = int(path.parent.name.removeprefix("seed"))
        shares.setdefault(path.parts[-3], {})[seed] = (
            100 * report[f"teacher_errors_{key}"] / max(1, report["teacher_errors"]))
    return shares


def minus(own, other):
    """The `eval.interval` of the differences of two {seed: number}, seed by seed."""
    return evaluation.interval([own[k] - other[k] for k in own if k in other])


def compared(differences, digits):
    """{name: [mean and ends, Holm's p]} of the `eval.interval`s {name: difference}, as a table has
    them."""
    p = evaluation.holm({name: d[3] for name, d in differences.items()})
    cells = {}
    for name, (mean, low, high, _) in differences.items():
        ends = "" if low is None else f" ({low:+.{digits}f} to {high:+.{digits}f})"
        cells[name] = ["-" if mean is None else f"{mean:+.{digits}f}{ends}",
                       f"{p[name]:.2g}" if name in p else "-"]
    return cells


def mistakes_table(folder, against):
    """Markdown: what the rows below `folder` make of the teacher's errors, and the difference to
    the row `against` with its 95 % interval and Holm's p over the rows."""
    keys = {"made": "the teacher's answer too", "avoided": "right instead"}
    lines = ["| run | n | " + " | ".join(f"{words}, % | difference to {against} (95 % interval) | "
                                         "p (Holm)" for words in keys.values()) + " |",
             "|---" * 8 + "|"]
    shares = [shares_of(folder, key) for key in keys]
    others = [compared({row: minus(by_row[row], by_row[against]) for row in by_row
                        if row != against}, 1) for by_row in shares]
    for row in shares[0]:
        cells = [row, str(len(shares[0][row]))]
        for by_row, differences in zip(shares, others):
            cells += [f"{np.mean([*by_row[row].values()]):.1f}", *differences.get(row, "--")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# What the paper claims, and the two rows that differ in it.
CLAIMS = {
    "the teacher's wrong top-1 misleads": ("06-teacher-swap", "05-kd-both-T1to6"),
    "swapping beats adding": ("06-teacher-swap", "07-GA-teacher"),
    "two teachers beat one": ("09-sld", "06-teacher-swap"),
    "the schedule helps": ("09-sld", "08-both-swaps"),
    "better than KD": ("09-sld", "03-kd-weak"),
    "better than KD on both views": ("09-sld", "04-kd-both"),
    "better than KD on both views at six temperatures": ("09-sld", "05-kd-both-T1to6"),
    "better than DKD": ("09-sld", "16-dkd-both"),
    "better than RLD": ("09-sld", "17-rld-both"),
    "more than a larger weight of CE": ("06-teacher-swap", "14-kd-both-T1to6-more-ce"),
}


def claims_table(folder):
    """Markdown: the claims whose rows are below `folder`, and the differences that test each, in
    top-1 and in the share of the teacher's errors that a student makes too, with Holm's p over the
    claims."""
    rows, made = evaluation.read_rows(folder), shares_of(folder, "made")
    pairs = {claim: pair for claim, pair in CLAIMS.items() if {*pair} <= {*rows}}
    top1 = compared({claim: evaluation.difference(rows[a], rows[b])
                     for claim, (a, b) in pairs.items()}, 2)
    repeats = compared({claim: minus(made[a], made[b]) for claim, (a, b) in pairs.items()}, 1)
    lines = ["| claim | rows | top-1, points (95 % interval) | p (Holm) | the teacher's mistakes "
             "made too, points (95 % interval) | p (Holm) |", "|---" * 6 + "|"]
    for claim, pair in pairs.items():
        cells = [claim, " minus ".join(pair), *top1[claim], *repeats[claim]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


TABLES = {"table": evaluation.table, "mistakes": mistakes_table, "claims": claims_table}


def fill_tables():
    """The tables of both READMEs, as eval.py makes them, or one of the functions above."""
    def table(match):
        folder, *against = match[2].split(" against ")
        try:
            made = TABLES[match[1]](ROOT / folder, *against)
        except (evaluation.UserError, KeyError) as error:
            # Of a group that is not whole yet.
            print(f"table left as it is: {error}")
            return match[0]
        return f"<!-- {match[1]}: {match[2]} -->\n{made}\n<!-- end -->"

    block = re.compile(r"<!-- (table|mistakes|claims): (.*?) -->\n.*?<!-- end -->", re.S)
    for page in (ROOT / "README.md", ROOT / "results/README.md"):
        page.write_text(block.sub(table, page.read_text("utf-8")), "utf-8")


AGAINST = "05-kd-both-T1to6"


def ladders():
    """{title: rows} of the ladders that are here with row 5, and not cut off."""
    found = {}
    for title, group in (("glyphs", "glyphs"), ("CIFAR-100", "cifar100")):
        with contextlib.suppress(evaluation.UserError):
            found[title] = evaluation.read_rows(ROOT / "results" / group)
    return {title: rows for title, rows in found.items() if AGAINST in rows}


def draw_differences(found):
    """Figure of the rows of each of `ladders`, minus row 5 of the same: mean and 95 % interval;
    filled where Holm's p is below 0.05."""
    figure = Figure(figsize=(9, 4.5), dpi=120, layout="constrained")
    for ax, (title, rows) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items()):
        names = [name for name in rows if name != AGAINST]
        differences = {name: evaluation.difference(rows[name], rows[AGAINST]) for name in names}
        p = evaluation.holm({name: d[3] for name, d in differences.items()})
        for y, (name, (mean, low, high, _)) in enumerate(differences.items()):
            colour = evaluation.BLUE if mean > 0 else evaluation.ORANGE
            face = colour if p.get(name, 1) < 0.05 else "white"
            ax.plot([low, high], [y, y], color=colour)
            ax.plot(mean, y, "o", color=colour, markerfacecolor=face)
        ax.axvline(0, color="grey", lw=1)
        ax.set(title=title, yticks=range(len(names)), yticklabels=names,
               xlabel="top-1 minus that of 05, points")
        ax.invert_yaxis()
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time; default 2")
    parser.add_argument("--rows", nargs="+", metavar="ROW",
                        help="only these; default all of the group")
    args = parser.parse_args()
    rows, seeds = GROUPS[args.group]
    unknown = set(args.rows or ()) - set(rows)
    if unknown:
        parser.error(f"--rows {unknown.pop()}: no row of {args.group}; choose among "
                     f"{', '.join(rows)}")
    rows = {row: flags for row, flags in rows.items() if row in (args.rows or rows)}
    (ROOT / "runs").mkdir(exist_ok=True)
    for name, flags in (GROUPS["teachers"][0] | PHOTOGRAPHS_TEACHERS).items():
        if any(TEACHER.format(name) in others for others in rows.values()):
            make(f"results/teachers/{name}", flags, 0)
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = [pool.submit(make, f"results/{args.group}/{row}", flags, seed) for seed in seeds
                for row, flags in rows.items()]
    status = max(run.result() for run in runs)
    if args.group in MISTAKES and status == 0:
        count_mistakes(ROOT / "results" / args.group)
    fill_tables()
    if args.group in MISTAKES and status == 0:
        draw_differences(ladders()).savefig(ROOT / "results/differences.png")
    sys.exit(status)


if __name__ == "__main__":
    train_shared() if sys.argv[1:2] == ["train"] else main()
