"""Make the runs behind the tables:  python results/run.py GROUP [--jobs 2] [--rows ROW …]

A run that is there is left alone, one that was cut off goes on. Each runs on one thread, but for
the rows that say otherwise, so that its numbers do not depend on --jobs. Logs go to
results/GROUP/<row>/seed<k>; weights stay beside them, out of git.
"""
import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEACHER = "--teacher-checkpoint results/teachers/{}/seed0/last.pt"
RESNET14 = "--method ce --student resnet14"
RECIPES = {"1-ce": "--method ce", "2-kd": f"--method kd {TEACHER}",
           "3-sld": f"--method sld {TEACHER}"}
GRID = {"ce": (0.2, 0.4, 0.8, 1.6), "kd": (0.2, 0.4, 0.8, 1.6), "sld": (0.05, 0.1, 0.2, 0.4)}
VIT_GRID = dict.fromkeys(("ce", "kd", "sld"), (0.0005, 0.001, 0.002))


def recipes(teacher="glyphs", more=""):
    return {row: f"{flags.format(teacher)} {more}" for row, flags in RECIPES.items()}


def grid(lrs, more=""):
    by_method = dict(zip(lrs, recipes("glyphs-val", more).values()))
    return {f"{method}-lr{lr:g}": f"{flags} --lr {lr:g} --evaluate val"
            for method, flags in by_method.items() for lr in lrs[method]}


# Group: (its rows, each with flags of train.py; the seeds).
GROUPS = {
    "teachers": ({"glyphs": RESNET14, "glyphs-val": f"{RESNET14} --evaluate val"}, range(1)),
    "stability": ({f"{name}-{n}-thread": f"{RESNET14} {flag}"
                   for name, flag in (("float32", "--no-amp"), ("bfloat16", "--amp"))
                   for n in (1, 2)}, range(3)),
    "tuning": (grid(GRID), range(1)),
    "tuning-teacher": ({f"resnet14-lr{lr:g}": f"{RESNET14} --evaluate val --lr {lr:g}"
                        for lr in (0.1, 0.2, 0.4, 0.8)}, range(1)),
    "tuning-vit": (grid(VIT_GRID, "--student vit_nano"), range(1)),
    "recipes": (recipes(), range(3)),
    "recipes-twice": (recipes(more="--epochs 16"), range(1)),
    "recipes-vit": (recipes(more="--student vit_nano"), range(1)),
    "vit-teacher": ({"1-vit_nano": "--method ce --student vit_nano"}, range(1)),
}


def make(folder, flags, seed):
    threads = "2" if folder.endswith("2-thread") else "1"
    folder = f"{folder}/seed{seed}"
    start = ["--resume"]
    if not (ROOT / folder / "config.json").exists():
        start = [*flags.split(), "--seed", str(seed)]
    log = ROOT / f"{folder}.out".replace("/", "-").replace("results-", "runs/")
    with open(log, "w") as out:
        done = subprocess.run([sys.executable, "train.py", *start, "--run-dir", folder], cwd=ROOT,
                              stdout=out, stderr=subprocess.STDOUT,
                              env=os.environ | dict(OMP_NUM_THREADS=threads))
    result = "done" if done.returncode == 0 else f"status {done.returncode}, see {out.name}"
    print(f"{folder}: {result}", flush=True)
    return done.returncode


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
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = [pool.submit(make, f"results/{args.group}/{row}", flags, seed)
                for seed in seeds for row, flags in rows.items()]
    sys.exit(max(run.result() for run in runs))


if __name__ == "__main__":
    main()
