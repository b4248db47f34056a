"""Make the runs behind the tables:  python results/run.py GROUP [--jobs 2] [--rows ROW …]

A finished run is left alone, one that was cut off goes on, a missing teacher is trained first. Each
runs on one thread of the CPU and in float32, but for the rows that say otherwise, so its numbers do
not depend on --jobs, a GPU or bfloat16. Logs go to results/GROUP/<row>/seed<k>; weights stay beside
them, out of git. A teacher's logits are kept in runs/logits, since rows of one seed and the same
views need the same ones. When a run ends, its student is measured once more, see `measure_end`; at
the end of all results/pages.py brings the page and its figures up to date.
"""
import argparse
import hashlib
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import train  # noqa: E402
from data import load  # noqa: E402
from eval import inheritance, measure, predict  # noqa: E402
from results import pages  # noqa: E402
from support import glyphs  # noqa: E402
from support.checkpoints import load_model, weights_digest  # noqa: E402
from support.files import atomic_write  # noqa: E402
from support.report import cost  # noqa: E402
from support.runs import write_json  # noqa: E402
from support.tables import is_finished, read_run  # noqa: E402
from train import RECIPES  # noqa: E402

# Real photographs and real ImageNet weights, which both have to be there:
# results/photographs/README.md says where they come from.
TRASHNET = "--dataset folder --data-dir data/trashnet --image-size 112"
# The teacher of the default experiment.
ALONE = "--method ce --student resnet14 --epochs 12 --lr 0.2"
MOBILENET = f"--method ce --student mobilenet_v2 {TRASHNET} --epochs 10"
# {seed: {name: flags}} of the networks that teach. Those of seed 0 were trained on the very views
# on which the students of seed 0 learn, and err less on them; hence the seed 1000 of later ones.
TEACHERS = {
    0: {"glyphs": ALONE, "glyphs-val": f"{ALONE} --evaluate val",
        "glyphs-vit": "--method ce --student vit_nano --views both --epochs 64 --lr 0.001"},
    1000: {"resnet14": ALONE, "resnet14-val": f"{ALONE} --evaluate val",
           # Nearly always right, and wrong on a third and on more than half of what it teaches.
           **{f"resnet14-{n}-epochs": f"--method ce --student resnet14 --epochs {n} --lr 0.2"
              for n in pages.OTHER_EPOCHS},
           "resnet14-noisy": f"{ALONE} --dataset glyphs-noisy",
           "trashnet": f"{MOBILENET} --optimizer adamw --lr 0.0003",
           "trashnet-val": f"{MOBILENET} --optimizer adamw --lr 0.0003 --evaluate val"},
}


def taught_by(name):
    """The flag for one of the TEACHERS."""
    seed = next(seed for seed, rows in TEACHERS.items() if name in rows)
    return f"--teacher-checkpoint results/teachers/{name}/seed{seed}/last.pt"


# SLD without its swaps: KD on SLD's views at its temperatures.
SIX = "--method kd --views both --temperatures 1 2 3 4 5 6"
# What has a learning rate of its own.
FAMILIES = {
    "ce": "--method ce", "ce-both": "--method ce --views both", "kd": "--method kd",
    "kd-both": "--method kd --views both",
    "sld-without-swaps": SIX, "sld": "--method sld", "mlkd": "--method mlkd",
    "dkd-both": "--method dkd --views both", "rld-both": "--method rld --views both"}
TEACHER_SWAP = "--method sld --no-student-swap"
# {row: (whose rate it has, flags)}: a row differs from the first of its family in one thing.
ROWS = {
    "student-alone": ("ce", "--method ce"),
    "student-alone-both": ("ce-both", "--method ce --views both"),
    "kd": ("kd", "--method kd"), "kd-both": ("kd-both", "--method kd --views both"),
    "sld-without-swaps": ("sld-without-swaps", SIX), "more-ce": ("sld-without-swaps", SIX),
    "more-ce-1": ("sld-without-swaps", f"{SIX} --ce-weight 1"),
    "more-ce-3": ("sld-without-swaps", f"{SIX} --ce-weight 3"),
    "only-teacher-swap": ("sld", TEACHER_SWAP),
    "mask": ("sld", f"{TEACHER_SWAP} --teacher-fix mask"),
    "add-wrong": ("sld", f"{TEACHER_SWAP} --teacher-fix add-wrong"),
    "sort": ("sld", f"{TEACHER_SWAP} --teacher-fix sort"),
    "student-swap": ("sld", "--method sld --teacher-fix none"), "sld": ("sld", "--method sld"),
    "sld-from-epoch-1": ("sld", "--method sld --gamma 0"),
    "sld-detached": ("sld", "--method sld --detach"),
    "sld-standardized": ("sld", "--method sld --standardize"),
    "dkd": ("dkd-both", "--method dkd --views both"),
    "rld": ("rld-both", "--method rld --views both"), "mlkd": ("mlkd", "--method mlkd")}
# Those that are run with other teachers.
BY_ERROR = ("sld-without-swaps", "more-ce-1", "more-ce-3", "mask", "only-teacher-swap", "sld")
# Those of the ladder's questions, and what all are to beat.
ASKED = {"student-alone", *(row for pair in pages.CONTRASTS.values() for row in pair)}
VIT_ROWS = ("student-alone", "kd", "sld-without-swaps", "more-ce", "only-teacher-swap", "sld")


def has_teacher(flags):
    return "--method ce" not in flags


def rows_of(names, rates, teacher, more="", weights=None):
    """{row: flags of train.py} of these ROWS. rates: {family: learning rate}. teacher: flags, for
    those that have one. weights: {row: a flag and its number}."""
    return {row: f"{flags} {(weights or {}).get(row, '')} --lr {rates[family]:g} {more} "
            + teacher * has_teacher(flags)
            for row, (family, flags) in ROWS.items() if row in names}


def grid(rates, teacher, more=""):
    """{row: flags} of each of these FAMILIES {family: rates} at each rate, on validation images."""
    return {f"{name}-lr{lr:g}": f"{FAMILIES[name]} --lr {lr:g} {more} --evaluate val "
            + teacher * has_teacher(FAMILIES[name]) for name in rates for lr in rates[name]}


# {family: its rates}: for train.py's defaults, and for a ladder of 18 epochs.
GRID = {"ce": (0.2, 0.4, 0.8), "kd": (0.1, 0.2, 0.4, 0.8), "sld": (0.05, 0.1, 0.2)}
GRID_NEIGHBOURS = {"dkd-both": (0.025, 0.05, 0.1, 0.2, 0.4),
                   "rld-both": (0.0125, 0.025, 0.05, 0.1, 0.2)}
GRID_VIT = dict.fromkeys(("ce", "kd", "sld"), (0.0005, 0.001, 0.002, 0.004, 0.008))
GRID_18 = {"sld": (0.05, 0.1, 0.2, 0.4), "sld-without-swaps": (0.05, 0.1, 0.2, 0.4),
           "kd-both": (0.2, 0.4, 0.8, 1.6), "ce": (0.2, 0.4, 0.8, 1.6),
           "ce-both": (0.1, 0.2, 0.4, 0.8), "kd": (0.1, 0.2, 0.4, 0.8),
           "mlkd": (0.05, 0.1, 0.2, 0.4), "dkd-both": (0.025, 0.05, 0.1, 0.2),
           "rld-both": (0.025, 0.05, 0.1, 0.2)}
GRID_CIFAR = {**dict.fromkeys(("ce", "kd", "kd-both"), (0.1, 0.2, 0.4)),
              **dict.fromkeys(("sld", "sld-without-swaps"), (0.025, 0.05, 0.1, 0.2))}
# The ladder: {family: the best rate of its grid}.
RATES_18 = {"sld": 0.2, "sld-without-swaps": 0.2, "kd": 0.2, "kd-both": 0.8, "ce": 0.8,
            "ce-both": 0.4, "mlkd": 0.1, "dkd-both": 0.1, "rld-both": 0.05}
RATES_CIFAR = {"ce": 0.2, "kd": 0.2, "kd-both": 0.2, "sld": 0.1, "sld-without-swaps": 0.1}
# {row: the flag of its weight, the values tried, the best of them}. CE's default weight, 0.1, is
# that of sld-without-swaps.
WEIGHTS_18 = {"more-ce": ("--ce-weight", (0.3, 1, 3), 0.3),
              "add-wrong": ("--omega", (0.5, 1, 2), 1),
              "dkd": ("--beta", (1, 2, 4, 8), 2), "rld": ("--beta", (0.25, 0.5, 1, 2, 4, 8), 0.5)}


def eighteen(teacher, rows, more="", weights=None, rates=RATES_18):
    """`rows_of` the ladder, taught by one of the TEACHERS; weights: default the best ones."""
    weights = weights or {row: f"{name} {best:g}" for row, (name, _, best) in WEIGHTS_18.items()}
    return rows_of(rows, rates, taught_by(teacher), f"--epochs 18 {more}", weights)


# Each of the weights, on validation images.
TUNING_WEIGHTS = {
    f"{row}{name[1:]}{value:g}": flags
    for row, (name, values, _) in WEIGHTS_18.items() for value in values
    for flags in eighteen("resnet14-val", [row], "--evaluate val",
                          {row: f"{name} {value:g}"}).values()}


def as_tuned(kind):
    """{family: rate} as train.py has them, tuned for ce, kd, sld, dkd and rld on glyphs."""
    rates = RECIPES["glyphs", kind]["lr"]
    return rates | {"kd-both": rates["kd"], "sld-without-swaps": rates["sld"],
                    "dkd-both": rates["dkd"], "rld-both": rates["rld"]}


# With a weight of CE that was chosen for nine epochs: results/tuning/ce-weight.
CE_WEIGHT = 1
MORE_CE = {"more-ce": f"--ce-weight {CE_WEIGHT}"}
# A step of SLD costs 3.4 times one of the student alone on one view, one of KD on one view 1.7
# times, of the student alone on both views 2 times: as many epochs as cost what 18 of SLD do.
EQUAL_COST = {"student-alone-both": 31, "kd": 36}
GRID_EQUAL = {"ce-both": (0.1, 0.2, 0.4, 0.8), "kd": (0.05, 0.1, 0.2, 0.4)}
RATES_EQUAL = {"ce-both": 0.4, "kd": 0.2}
# In bfloat16, with which a processor that has it is 1.7 times as fast.
CIFAR = ("--amp --dataset cifar100 --data-dir data/cifar100 --student resnet8 --schedule cosine "
         "--epochs 20 --warmup 2")
CE_WEIGHT_CIFAR = 3
CIFAR_TEACHER = "--teacher resnet20 --teacher-checkpoint data/cifar100_resnet20.pth"
PUBLISHED_TEACHER = "--teacher resnet56 --teacher-checkpoint data/cifar100_resnet56.pth"
PUBLISHED = {"ce": "--method ce", "kd": "--method kd", "sld": "--method sld",
             "sld-without-swaps": f"{SIX} --lr 0.025"}


# Pretrained networks: rates of a teacher alone, and of a smaller student with each method.
PHOTO_TEACHERS = {
    f"{kind}-lr{lr:g}": f"{MOBILENET} --evaluate val --optimizer {kind} --lr {lr:g}"
    for kind, rates in (("sgd", (0.001, 0.003, 0.01)), ("adamw", (0.0001, 0.0003, 0.001)))
    for lr in rates}
PHOTO_STUDENT = f"--student squeezenet1_0 {TRASHNET} --epochs 10"
PHOTO_GRID = {("ce", "sgd"): (0.0003, 0.001, 0.003),
              **{(method, "adamw"): (0.00003, 0.0001, 0.0003, 0.001)
                 for method in ("ce", "kd", "sld", "mlkd", "dkd", "rld")}}
PHOTO_TUNING = {
    f"{method}-{kind}-lr{lr:g}":
    f"--method {method} {PHOTO_STUDENT} --evaluate val --optimizer {kind} --lr {lr:g}"
    + (method != "ce") * f" --teacher mobilenet_v2 {taught_by('trashnet-val')}"
    for (method, kind), rates in PHOTO_GRID.items() for lr in rates}


# {group: ({row: flags of train.py}, seeds)}
GROUPS = {
    "glyphs/ladder": (eighteen("resnet14", ROWS), range(5)),
    "glyphs/equal-cost": (
        {row: flags for name, n in EQUAL_COST.items() for row, flags in
         rows_of([name], RATES_EQUAL, taught_by("resnet14"), f"--epochs {n}").items()}, range(5)),
    # Each rate was chosen with one seed, so: does its neighbour give the same answers? And do the
    # nine epochs of train.py's default?
    "glyphs/ladder-half-rate": (
        eighteen("resnet14", ASKED | {"student-alone-both"},
                 rates={k: lr / 2 for k, lr in RATES_18.items()}), range(5)),
    "glyphs/ladder-9-epochs": (
        rows_of(ASKED, as_tuned("sgd"), taught_by("resnet14"), weights=MORE_CE), range(5)),
    **{f"glyphs/teachers-by-error/{n}-epochs":
       (eighteen(f"resnet14-{n}-epochs", BY_ERROR), range(5)) for n in pages.OTHER_EPOCHS},
    "glyphs/noisy-labels": (eighteen("resnet14-noisy", ("student-alone-both", *BY_ERROR),
                                     "--dataset glyphs-noisy"), range(5)),
    "glyphs/vit": (rows_of(VIT_ROWS, as_tuned("adamw"), taught_by("glyphs"), "--student vit_nano",
                           MORE_CE), range(5)),
    # A ViT teaches.
    "glyphs/vit-teacher": (rows_of(("student-alone", "kd", "sld"), as_tuned("sgd"),
                                   f"--teacher vit_nano {taught_by('glyphs-vit')}"), range(3)),
    # The data and the public teachers have to be there: results/README.md says where.
    "cifar100/ladder": (rows_of(pages.ON_CIFAR, RATES_CIFAR, CIFAR_TEACHER, CIFAR,
                                {"more-ce": f"--ce-weight {CE_WEIGHT_CIFAR:g}"}), range(3)),
    # The published recipe as it stands, 240 epochs, in bfloat16.
    "cifar100/published": (
        {row: "--amp --dataset cifar100 --data-dir data/cifar100 --student resnet20 "
              f"{flags} {PUBLISHED_TEACHER * (row != 'ce')}" for row, flags in PUBLISHED.items()},
        range(1)),
    # At the rates of train.py: what the student is compared with, and the student.
    "photographs/mobilenet_v2": ({"ce": MOBILENET}, range(3)),
    "photographs/mobilenet_v2-224px": ({"ce": f"{MOBILENET} --image-size 224"}, range(3)),
    "photographs/squeezenet1_0": (
        {method: f"--method {method} {PHOTO_STUDENT}"
         + (method != "ce") * f" --teacher mobilenet_v2 {taught_by('trashnet')}"
         for method in ("ce", "kd", "sld")}, range(3)),
    "tuning/glyphs": (grid(GRID, taught_by("glyphs-val")), range(5)),
    "tuning/glyphs-neighbours": (grid(GRID_NEIGHBOURS, taught_by("glyphs-val")), range(1)),
    # The row of 0.2 is teachers/glyphs-val.
    "tuning/teacher": ({f"resnet14-lr{lr:g}": f"{ALONE} --evaluate val --lr {lr:g}"
                        for lr in (0.1, 0.4)}, range(1)),
    "tuning/ce-weight": (
        {f"ce-weight{weight:g}": f"{SIX} --ce-weight {weight:g} --lr {as_tuned('sgd')['sld']:g} "
         f"{taught_by('glyphs-val')} --evaluate val" for weight in (0.1, 0.3, 1, 3, 10)}, range(2)),
    "tuning/ladder": (grid(GRID_18, taught_by("resnet14-val"), "--epochs 18"), range(1)),
    "tuning/ladder-weights": (TUNING_WEIGHTS, range(1)),
    "tuning/equal-cost": (
        {row: flags for name, n in EQUAL_COST.items() for family in [ROWS[name][0]] for row, flags
         in grid({family: GRID_EQUAL[family]}, taught_by("resnet14-val"), f"--epochs {n}").items()},
        range(1)),
    "tuning/vit": (grid(GRID_VIT, taught_by("glyphs-val"), "--student vit_nano"), range(2)),
    "tuning/cifar100": (grid(GRID_CIFAR, CIFAR_TEACHER, CIFAR), range(1)),
    "tuning/cifar100-weights": (
        {f"more-ce-ce-weight{weight:g}": f"{SIX} --ce-weight {weight:g} {CIFAR} {CIFAR_TEACHER} "
         f"--lr {RATES_CIFAR['sld-without-swaps']:g} --evaluate val"
         for weight in (0.3, 1, 3)}, range(1)),
    "tuning/photographs-teacher": (PHOTO_TEACHERS, range(1)),
    "tuning/photographs": (PHOTO_TUNING, range(1)),
    "checks/stability": (
        {f"{name}-{n}-thread": f"{ALONE} {flag}"
         for name, flag in (("float32", ""), ("bfloat16", "--amp")) for n in (1, 2)}, range(3)),
}


def remember(teacher, digest, s):
    """`teacher`, which looks for its logits in runs/logits before it computes them, and leaves them
    there. They are found by the very bytes of the images, so a log is the same to the bit."""
    compute, folder = teacher.forward, Path("runs/logits") / f"{digest}{'-amp' * s.amp}"

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


def fresh_glyphs():
    """50,000 glyphs that no run has met, and their labels: ten times the test images, so that the
    difference of two students has a third of their noise."""
    file = Path("runs/fresh-glyphs.npz")
    if not file.exists():
        images, labels = glyphs.render(50_000, seed=50_000)
        with atomic_write(file) as whole:
            np.savez(whole, images=images, labels=labels)
    with np.load(file) as kept:
        return torch.from_numpy(kept["images"]), torch.from_numpy(kept["labels"])


def teacher_in(flags):
    """(file, name or None) of the teacher in flags of train.py; None where there is none."""
    after = dict(zip(flags.split(), flags.split()[1:]))
    file = after.get("--teacher-checkpoint")
    return file and (file, after.get("--teacher"))


def measure_end(run, teacher):
    """Write final.json beside the log of a run that is measured on test images: `cost` and
    `eval.measure` of its last epoch and, with a teacher (file, name), `eval.inheritance`; of glyphs
    on fresh ones."""
    s, _ = read_run(run)
    if s["evaluate"] == "val":
        return
    data = load(s["dataset"], s["data_dir"], s["image_size"], train=False)
    images, labels = fresh_glyphs() if s["dataset"].startswith("glyphs") else data.test
    student, _ = load_model(run, None, data)
    logits = predict(student, images, data.mean, data.std)
    report = cost(student, images.shape[-1]) | measure(logits, labels)
    if teacher:
        teacher, _ = load_model(*teacher, data)
        teacher = remember(teacher, weights_digest(teacher), train.Settings(amp=False))
        report |= inheritance(logits, predict(teacher, images, data.mean, data.std), labels)
    write_json(Path(run, "final.json"), report)


def train_alone(flags, threads, out, run, teacher):
    """train.py with these flags and then `measure_end`, in a process of its own. Returns the exit
    status."""
    torch.set_num_threads(threads)
    sys.argv = ["train.py", *flags]
    with open(out, "w") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            train.main(remember)
        except SystemExit as end:
            return end.code or 0
        measure_end(run, teacher)
    return 0


def make(pool, row, flags, seed, teacher=None):
    """Have the run of this seed trained in row/seed<k>, or go on, unless its logs are whole.
    Returns a function that waits for the exit status. row: a folder, from ROOT on. teacher: for
    `measure_end` of a student that has none."""
    folder = logs = f"{row}/seed{seed}"
    if Path(logs, "metrics.jsonl").exists() and is_finished(*(found := read_run(logs))):
        weights = Path(logs, "last.pt").exists()
        measured = Path(logs, "final.json").exists() or found[0]["evaluate"] == "val"
        # A teacher's weights are needed too, of other runs the logs are enough.
        if weights if row.startswith("results/teachers/") else measured or not weights:
            print(f"{logs}: is there", flush=True)
            return lambda: 0
        if not weights:
            # The weights are not in git: train again elsewhere, and put them beside their logs.
            folder = f"runs/{logs.replace('/', '-')}"
    start = [*flags.split(), "--seed", str(seed)]
    if Path(folder, "config.json").exists():
        start = ["--resume"]
    elif "--amp" not in start:
        start = ["--no-amp", *start]
    out = f"runs/{folder.replace('/', '-')}.out"
    found = pool.submit(train_alone, ["--device", "cpu", *start, "--run-dir", folder],
                        2 if row.endswith("2-thread") else 1, out, folder,
                        teacher_in(flags) or teacher)

    def wait():
        status = found.result()
        if status == 0 and folder != logs:
            shutil.copy(Path(folder, "last.pt"), logs)
        print(f"{folder}: {f'status {status}, see {out}' if status else 'done'}", flush=True)
        return status
    return wait


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
    rows = {row: rows[row] for row in args.rows or rows}
    os.chdir(ROOT)
    Path("runs").mkdir(exist_ok=True)
    # A process for each run, none of which inherits threads that others have started.
    with ProcessPoolExecutor(args.jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        for seed, teachers in TEACHERS.items():
            for name, flags in teachers.items():
                needed = any(taught_by(name) in others for others in rows.values())
                if needed and (status := make(pool, f"results/teachers/{name}", flags, seed)()):
                    sys.exit(status)
        teacher = next(filter(None, map(teacher_in, GROUPS[args.group][0].values())), None)
        runs = [make(pool, f"results/{args.group}/{row}", flags, seed, teacher) for seed in seeds
                for row, flags in rows.items()]
        status = max(wait() for wait in runs)
    pages.update()
    sys.exit(status)


if __name__ == "__main__":
    main()
