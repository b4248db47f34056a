"""Train a student:  python train.py --method sld   (or kd, or ce, which has no teacher).

Every setting is a flag; what is left out takes the recipe of the method and the data set: published, or tuned for glyphs.
A run writes runs/<name>/{config.json, env.json, metrics.jsonl, last.pt, best.pt}.
From a notebook:  history = train.run(train.Settings(method="kd", epochs=2)).
"""
import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import filelock
import torch
import torchvision
from tqdm import tqdm

import losses
from data import DATASETS, SIDES, UserError, batches, load, write_atomically
from eval import check_fits, load_model, measure, predict
from models import MODELS, create_model, fold_batch_norm
from swap import misclassified


def setting(help, kind=str, **more):
    return dataclasses.field(default=None, metadata=dict(help=help, type=kind, **more))


@dataclasses.dataclass(frozen=True)
class Settings:
    """All of an experiment. None means the value of the method's or the data set's recipe."""
    method: str = setting("what is minimised; default sld", choices=("ce", "kd", "sld"))
    dataset: str = setting("default glyphs, rendered here, no download", choices=DATASETS)
    data_dir: str = setting("where the data is or is cached; default data", metavar="DIR")
    image_size: int = setting("side in pixels, for --dataset folder; default 64", int, metavar="PX")
    teacher: str = setting("teacher network", choices=MODELS, metavar="NAME")
    teacher_checkpoint: str = setting("its weights; default: the cached ones, or trained first", metavar="FILE")
    student: str = setting(f"student network, one of {', '.join(MODELS)}", choices=MODELS, metavar="NAME")
    epochs: int = setting("default 240 on CIFAR, 60 on a folder, 8 on glyphs (16 for a ViT)", int)
    batch_size: int = setting("images a step; default 64", int)
    lr: float = setting("learning rate; sgd: 0.05 for ce and kd, 0.025 for sld; adamw: 0.001; own ones on glyphs", float)
    weight_decay: float = setting("on all parameters; 5e-4 for sgd, 0.05 for adamw", float)
    optimizer: str = setting("sgd has momentum 0.9; adamw for a ViT student", choices=("sgd", "adamw"))
    schedule: str = setting("step: x0.1 after 150, 180, 210 of 240 epochs; cosine on glyphs and for a ViT student",
                            choices=("step", "cosine"))
    warmup: float = setting("epochs of linear warm-up; 0, or a tenth of the epochs on glyphs and for a ViT student", float)
    views: str = setting("weak (crop, flip), or both: weak and strong; both for sld", choices=("weak", "both"))
    temperatures: tuple = setting("T of the KL; 4 for kd, 1 2 3 4 5 6 for sld", float, nargs="+", metavar="T")
    gamma: int = setting("the student swap starts after this epoch; 150 of 240", int)
    ce_weight: float = setting("a of (S6); 0.1, for ce 1", float)
    kd_weight: float = setting("b of (S6); 0.9", float)
    teacher_fix: str = setting("what is done to the teacher's logits; swap", choices=("swap", "add", "none"))
    omega: float = setting("logit units added to the label's, for --teacher-fix add", float)
    student_swap: bool = setting("use the pseudo-teacher, (S4); on", bool)
    detach: bool = setting("stop the gradient through the pseudo-teacher; off, as released", bool)
    evaluate: str = setting("images to measure on: the test part, or val, a tenth of the training images that is then "
                            "not trained on; choose hyper-parameters on val; default test", choices=("test", "val"))
    seed: int = setting("of initial weights, order and views; default 0", int)
    device: str = setting("default auto", choices=("auto", "cpu", "cuda", "mps"))
    amp: bool = setting("mixed precision; on for CUDA and for CPUs with bfloat16 instructions", bool)
    compile: bool = setting("torch.compile the student: up to a minute more at the start; off", bool)
    run_dir: str = setting("default runs/<dataset>-<method>-<student>-seed<seed>", metavar="DIR")
    resume: bool = setting("go on from DIR/last.pt, with the run's own settings", bool)


# --- Recipes --------------------------------------------------------------------------------------
# A method's entry lists what it can be told. ce and kd are the field's (RepDistiller), sld is the
# paper's released code; README, "Details that matter".
METHODS = {
    "ce": dict(views="weak", lr=0.05),
    "kd": dict(views="weak", lr=0.05, teacher=None, teacher_checkpoint=None, temperatures=(4.0,),
               ce_weight=0.1, kd_weight=0.9),
    "sld": dict(views="both", lr=0.025, teacher=None, teacher_checkpoint=None, temperatures=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0),
                ce_weight=0.1, kd_weight=0.9, gamma=None, teacher_fix="swap", omega=None, student_swap=True, detach=False),
}
SIZES = {
    "glyphs": dict(teacher="resnet14", student="resnet8", epochs=8),
    "cifar10": dict(teacher="resnet56", student="resnet20", epochs=240),
    "cifar100": dict(teacher="resnet56", student="resnet20", epochs=240),
    "folder": dict(teacher="resnet20", student="resnet8", epochs=60),
}
OPTIMIZERS = {
    "sgd": dict(schedule="step", weight_decay=5e-4, warmup=0.0),
    "adamw": dict(schedule="cosine", weight_decay=0.05, lr=1e-3),
}
TUNED = {                                                      # for glyphs, on its validation part: results/tuning
    "sgd": dict(lr=dict(ce=0.4, kd=0.8, sld=0.2), schedule="cosine", warmup=None),
    "adamw": dict(lr=dict(ce=1e-3, kd=1e-3, sld=1e-3), epochs=16),
}
COMMON = dict(method="sld", dataset="glyphs", data_dir="data", batch_size=64, seed=0, evaluate="test", device="auto", compile=False, resume=False)
MILESTONES, GAMMA, OF = (150, 180, 210), 150, 240              # epochs of the published recipe
PARTS = dict(test="test", val="validation")
FREE = ("run_dir", "resume", "data_dir", "device", "teacher_checkpoint")   # may change when a run is resumed


def flag(name):
    return "--" + name.replace("_", "-")


def resolve(s):
    """Settings with every None filled from the recipes. Raises UserError for values that make no sense."""
    given = {k: v for k, v in dataclasses.asdict(s).items() if v is not None}
    full = COMMON | given
    for field in dataclasses.fields(Settings):                 # argparse has checked; a notebook has not
        known = field.metadata.get("choices")
        if known and field.name in full and full[field.name] not in known:
            raise UserError(f"{flag(field.name)} {full[field.name]}: unknown; choose one of {', '.join(known)}")
    recipe, size = METHODS[full["method"]], SIZES[full["dataset"]]
    foreign = [flag(k) for k in METHODS["sld"] if k in given and k not in recipe]
    if foreign:
        raise UserError(f"{', '.join(foreign)}: no part of --method {full['method']}; leave it out, or choose another method")
    vit = given.get("student", size["student"]).startswith("vit")
    optimizer = given.get("optimizer", "adamw" if vit else "sgd")
    tuned = TUNED[optimizer] | dict(lr=TUNED[optimizer]["lr"][full["method"]]) if full["dataset"] == "glyphs" else {}
    full = dict.fromkeys(f.name for f in dataclasses.fields(Settings)) | COMMON | recipe | size | dict(image_size=SIDES[full["dataset"]]) \
        | dict(optimizer=optimizer) | OPTIMIZERS[optimizer] | tuned | given
    if "teacher" not in recipe:
        full["teacher"] = None
    if full["warmup"] is None:                                 # with the cosine
        full["warmup"] = full["epochs"] / 10

    def check(name, low, strict=True):
        for value in (full[name] if isinstance(full[name], (tuple, list)) else (full[name],)):
            if value is not None and not (low < value < math.inf or value == low and not strict):
                raise UserError(f"{flag(name)} {value}: must be {'above' if strict else 'at least'} {low}")
    for name in ("epochs", "batch_size", "lr", "image_size", "temperatures"):
        check(name, 0)
    for name in ("weight_decay", "warmup", "ce_weight", "kd_weight", "seed"):
        check(name, 0, strict=False)
    if full["seed"] >= 2 ** 32:
        raise UserError(f"--seed {full['seed']}: must be below 2^32")
    if full["warmup"] >= full["epochs"]:
        raise UserError(f"--warmup {full['warmup']:g}: must be shorter than the {full['epochs']} epochs")
    for network in (full["student"], full["teacher"]):
        if network and network.startswith("vit") and full["image_size"] % 8:
            raise UserError(f"--image-size {full['image_size']}: {network} needs a multiple of 8")
    if full["temperatures"] is not None:
        full["temperatures"] = tuple(full["temperatures"])
        if not full["temperatures"]:
            raise UserError("--temperatures: give at least one")
    if not full["student_swap"] and ("gamma" in given or "detach" in given):
        raise UserError("--gamma, --detach: these belong to the student swap; leave out --no-student-swap or them")
    if full["student_swap"] and full["gamma"] is None:
        full["gamma"] = min(round(GAMMA * full["epochs"] / OF), full["epochs"] - 1)
    if full["student_swap"] and not 0 <= full["gamma"] < full["epochs"]:
        raise UserError(f"--gamma {full['gamma']}: the student swap would never start in a run of {full['epochs']} epochs; "
                        f"give 0 to {full['epochs'] - 1}, or --no-student-swap")
    if (full["teacher_fix"] == "add") != (full["omega"] is not None):
        raise UserError("--omega: give it with --teacher-fix add, and only there")
    if full["omega"] is not None and not math.isfinite(full["omega"]):
        raise UserError(f"--omega {full['omega']}: must be a finite number")
    if full["run_dir"] is None:
        name = f"{full['dataset']}-{full['method']}-{full['student']}-seed{full['seed']}"
        numbered = (Path("runs") / (f"{name}-{k}" if k > 1 else name) for k in range(1, 10**6))
        full["run_dir"] = str(next(path for path in numbered if not path.exists()))
    return Settings(**full)


def learning_rate(s, done):
    """The rate when `done` epochs are done, fractions within an epoch. s: resolved Settings."""
    if done < s.warmup:
        return s.lr * done / s.warmup
    if s.schedule == "cosine":
        return s.lr * 0.5 * (1 + math.cos(math.pi * (done - s.warmup) / (s.epochs - s.warmup)))
    return s.lr * 0.1 ** sum(done >= m for m in {round(m * s.epochs / OF) for m in MILESTONES})


def make_objective(s):
    """f(student_logits, teacher_logits, target, epoch) -> named terms of one view."""
    if s.method == "ce":
        return lambda z_s, z_t, y, epoch: losses.ce(z_s, y)
    options = dict(temperatures=s.temperatures, ce_weight=s.ce_weight, kd_weight=s.kd_weight)
    if s.method == "kd":
        return lambda z_s, z_t, y, epoch: losses.kd(z_s, z_t, y, **options)
    options |= dict(gamma=s.gamma, teacher_fix=s.teacher_fix, omega=s.omega, student_swap=s.student_swap, detach=s.detach)
    return lambda z_s, z_t, y, epoch: losses.sld(z_s, z_t, y, epoch=epoch, **options)


def in_words(s):
    """The resolved experiment, one line for each of its parts."""
    loss = "CE(label)"
    if s.method != "ce":
        fixed = {"swap": "swapped teacher", "add": f"teacher + {s.omega} on the label"}.get(s.teacher_fix, "teacher")
        loss = (f"{s.ce_weight:g} CE(label) + {s.kd_weight:g} T^2 KL({fixed} || student) "
                f"at T = {', '.join(f'{T:g}' for T in s.temperatures)}")
    if s.student_swap:
        loss += (f"\n          + {s.kd_weight:g} T^2 KL(swapped student || student) from epoch {s.gamma + 1} on"
                 f"{', its gradient stopped' if s.detach else ''}")
    drops = sorted({round(m * s.epochs / OF) for m in MILESTONES} - {s.epochs})
    rate = "cosine to 0" if s.schedule == "cosine" else f"x0.1 after epoch {', '.join(map(str, drops))}" if drops else "constant"
    return (f"minimise  {loss}\n"
            f"on        {'weak and strong views' if s.views == 'both' else 'the weak view'} of {s.dataset}, student {s.student}\n"
            f"with      {s.optimizer}, lr {s.lr:g} {rate}"
            f"{f', warm-up {s.warmup:g} epochs' if s.warmup else ''}, weight decay {s.weight_decay:g}, "
            f"{s.epochs} epochs, batch {s.batch_size}, seed {s.seed}")


# --- Device, files ----------------------------------------------------------------------------------

def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    elif name == "cuda" and not torch.cuda.is_available() or name == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {name}: not available here; leave the flag out or give cpu")
    return torch.device(name)


def amp_by_default(device):
    """CUDA has fast float16; of CPUs only those with bfloat16 instructions gain."""
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return device.type == "cuda" or device.type == "cpu" and has_bf16()


def mixed_precision(device, on):
    """(autocast, GradScaler): float16 on CUDA, whose small gradients the scaler keeps from underflow; bfloat16 elsewhere."""
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=on), torch.amp.GradScaler(device.type, enabled=on and dtype == torch.float16)


def make_optimizer(s, student):
    if s.optimizer == "sgd":
        return torch.optim.SGD(student.parameters(), s.lr, momentum=0.9, weight_decay=s.weight_decay)
    return torch.optim.AdamW(student.parameters(), s.lr, weight_decay=s.weight_decay)


def compiled(student, device):
    """torch.compile(student), which shares its weights; or student itself where no compiler is there."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:                                 # torch raises many kinds, private ones among them
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        print(f"note      --compile: no working compiler here, going on without ({reason})")
        return student
    return torch.compile(student)


def write_json(path, value):
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def write_checkpoint(path, value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_atomically(path, buffer.getvalue())


def lock(folder):
    """A context that keeps other processes out of `folder`, and lets go when this process ends in whatever way.
    Raises UserError where another one is in. A file system that knows no locks keeps nobody out."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return filelock.FileLock(folder / "lock").acquire(blocking=False)
    except filelock.Timeout:
        raise UserError(f"{folder}: another process is training there; wait until it is done, or give another --run-dir")
    except (OSError, NotImplementedError):
        return contextlib.nullcontext()


def write_metrics(folder, history):
    write_atomically(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history).encode())


def environment(device):
    def git(*command):
        done = subprocess.run(["git", "-C", Path(__file__).parent, *command], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None
    try:
        commit = git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, TypeError):                               # no git here, or no checkout
        commit = None
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    if not name and Path("/proc/cpuinfo").exists():            # Linux leaves platform.processor() empty
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), None)
    return dict(python=platform.python_version(), torch=torch.__version__, torchvision=torchvision.__version__,
                system=platform.system(), machine=platform.machine(), device=device.type, device_name=name,
                threads=torch.get_num_threads(), commit=commit, command=" ".join(["train.py", *sys.argv[1:]]))


# --- The teacher ------------------------------------------------------------------------------------

def get_teacher(s, data, device):
    """(the frozen teacher in eval mode, digest of its weights), from --teacher-checkpoint, the cache, or trained now."""
    path = s.teacher_checkpoint
    if path is None:
        name = s.dataset
        if name == "folder":                                   # two folders may share a name: the images tell them apart
            images, labels = (part.cpu().numpy() for part in data.train)
            name = f"{Path(s.data_dir).resolve().name}-{s.image_size}px-{zlib.crc32(labels, zlib.crc32(images)):08x}"
        if s.evaluate == "val":                                # it must not know the images that are measured on either
            name += "-val"
        folder = Path("runs") / f"teacher-{name}-{s.teacher}"
        path = folder / "last.pt"
        started = (folder / "config.json").exists()
        done = load_model(path)[1].get("epoch", 0) if path.exists() else 0
        if not started or done < json.loads((folder / "config.json").read_text())["epochs"]:
            print(f"no {s.teacher} teacher for {name} yet: {'going on with' if started else 'training'} it first, in {folder}\n"
                  f"(your own instead: --teacher-checkpoint FILE)\n")
            whole = {} if started else dict(method="ce", dataset=s.dataset, image_size=s.image_size, student=s.teacher, evaluate=s.evaluate,
                                            batch_size=min(64, len(data.train[1])), amp=s.amp)
            run(Settings(**whole, data_dir=s.data_dir, device=s.device, run_dir=str(folder), resume=started))
            print()
    teacher, checkpoint = load_model(path, s.teacher)
    check_fits(path, checkpoint, teacher, data)
    teacher = teacher.requires_grad_(False).to(device, memory_format=torch.channels_last)
    top1 = measure(predict(teacher, data.test[0], data.mean, data.std), data.test[1])["top1"]
    C = len(data.classes)
    floor = 100 * min(2 / C, 1 / C + 0.1)                      # twice chance means nothing for 2 classes
    if not top1 > floor:
        raise UserError(f"{path}: the teacher has {top1:.2f} % {s.evaluate} top-1, no better than {floor:.2f} % "
                        f"({'twice chance' if C >= 10 else 'ten points above chance'}); give another --teacher-checkpoint")
    print(f"teacher   {s.teacher} from {path}: {top1:.2f} % {s.evaluate} top-1")
    digest = hashlib.sha256(b"".join(v.cpu().numpy().tobytes() for v in teacher.state_dict().values())).hexdigest()
    return fold_batch_norm(teacher), digest


# --- One epoch --------------------------------------------------------------------------------------

LOOK_EVERY = 50                                                # steps: a look at a GPU's numbers makes it wait


def count_skipped(numbers, s, epoch, first, steps, scaler):
    """How many of these steps GradScaler left out. numbers: one tensor a step, from step `first` on: loss, gradient
    norm, largest |logit| of the student, and of the teacher if any. Raises UserError for non-finite ones that stay."""
    numbers = torch.stack(numbers).cpu()
    bad = ~numbers[:, :2].isfinite().all(1)
    if not bad.any() or scaler.is_enabled() and scaler.get_scale() > 2 ** -14:   # 30 skips in a row from 2^16 down
        return int(bad.sum())
    k = int(bad.nonzero()[0])
    largest = ", ".join(f"{who} {value:g}" for who, value in zip(("student", "teacher"), numbers[k, 2:].tolist()))
    raise UserError(f"epoch {epoch}, step {first + k} of {steps}, lr {learning_rate(s, epoch - 1 + (first + k - 0.5) / steps):g}: "
                    f"loss or gradient is not finite (largest logit: {largest}); what was saved still loads; "
                    f"try a smaller --lr{' or --no-amp' if s.amp else ''}")


def train_epoch(s, epoch, student, teacher, objective, data, optimizer, scaler, autocast):
    """One pass over the training part. Returns the epoch's sums as plain numbers, read off the device once."""
    device = next(student.parameters()).device
    steps = math.ceil(len(data.train[1]) / s.batch_size)
    sums, rows, skipped, unseen = {}, 0, 0, []
    wide = torch.float32 if device.type == "mps" else torch.float64     # MPS has no float64
    student.train()
    bar = tqdm(batches(data, s.batch_size, s.views, s.seed, epoch), f"epoch {epoch}", steps, leave=False, disable=None)
    for step, (views, target) in enumerate(bar):
        views = [view.to(device, memory_format=torch.channels_last) for view in views]   # each (B, 3, S, S)
        target = target.to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(s, epoch - 1 + (step + 0.5) / steps)

        with autocast:
            teacher_logits = [None] * len(views)
            if teacher:                                        # one pass: eval mode mixes no rows
                teacher_logits = teacher(torch.cat(views)).float().split(len(target))     # each (B, C)
            student_logits = [student(view).float() for view in views]   # weak, then strong: own batch statistics
        terms = {}                                             # (S6), summed over the views, in float32
        for z_s, z_t in zip(student_logits, teacher_logits):
            for name, term in objective(z_s, z_t, target, epoch).items():
                terms[name] = terms.get(name, 0) + term

        loss = sum(terms.values())
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in student.parameters()], math.inf)   # a sum of squares could overflow
        scaler.step(optimizer)                                 # float16 only: leaves out a step with non-finite gradients
        scaler.update()

        rows += len(target)
        with torch.no_grad():                                  # stays on the device: no sync
            largest = [torch.stack(logits).abs().amax() for logits in (student_logits, teacher_logits) if logits[0] is not None]
            unseen.append(torch.stack([loss, norm, *largest]))
            counted = {f"loss_{name}": term.detach() * len(target) for name, term in terms.items()}
            for view, z_s, z_t in zip(("weak", "strong"), student_logits, teacher_logits):
                counted[f"swap_student_{view}"] = misclassified(z_s, target).sum()
                if teacher:
                    counted[f"swap_teacher_{view}"] = misclassified(z_t, target).sum()
            for name, value in counted.items():
                sums[name] = sums.get(name, 0) + value.to(wide)
        if len(unseen) == LOOK_EVERY or step == steps - 1:     # late, but before anything is saved
            skipped += count_skipped(unseen, s, epoch, step + 2 - len(unseen), steps, scaler)
            unseen = []
    return {name: value.item() / rows for name, value in sums.items()}, skipped


# --- A run ------------------------------------------------------------------------------------------

COLUMNS = (  # heading, key, width, format
    ("epoch", "epoch", 5, "d"), ("lr", "lr", 8, ".2g"), ("ce", "loss_ce", 7, ".3f"), ("teacher", "loss_teacher", 8, ".3f"),
    ("student", "loss_student", 8, ".3f"), ("train%", "train_top1", 7, ".2f"), ("{part}%", "{part}_top1", 6, ".2f"),
    ("best%", "best_top1", 6, ".2f"), ("swapTw%", "swap_teacher_weak", 8, ".2f"), ("swapTs%", "swap_teacher_strong", 8, ".2f"),
    ("swapS%", "swap_student", 7, ".2f"), ("sec", "seconds", 7, ".1f"), ("img/s", "images_per_second", 7, ".0f"))


def header(part):
    """The heading of the epochs' lines. part: "test" or "val", as in Settings.evaluate."""
    return " ".join(heading.format(part=part).rjust(width) for heading, _, width, _ in COLUMNS)


def epoch_line(row, part):
    """One fixed-width line under the header; what the method does not have shows as a dash."""
    keys = [key.format(part=part) for _, key, _, _ in COLUMNS]
    return " ".join((format(row[key], form) if key in row else "-").rjust(width) for key, (_, _, width, form) in zip(keys, COLUMNS))


def open_run(s):
    """(resolved Settings, checkpoint to go on from or None). Raises UserError where the folder holds another run."""
    if not s.resume:
        s = resolve(s)
        folder = Path(s.run_dir)
        if folder.is_dir() and any(path.name != "lock" and path.suffix != ".tmp" for path in folder.iterdir()):
            raise UserError(f"--run-dir {folder}: already holds a run or other files; give another, or --resume to go on")
        return s, None
    if s.run_dir is None:
        raise UserError("--resume: say which run with --run-dir")
    folder = Path(s.run_dir)
    try:
        saved = json.loads((folder / "config.json").read_text())
        saved = Settings(**dict(evaluate="test") | saved | dict(temperatures=saved["temperatures"] and tuple(saved["temperatures"])))
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(f"--resume: {folder} holds no run to go on with (no readable config.json)")
    given = {k: v for k, v in dataclasses.asdict(s).items() if v is not None}
    changed = [f"{flag(k)} {getattr(saved, k)} -> {v}" for k, v in given.items()
               if k not in FREE and (tuple(v) if isinstance(v, list) else v) != getattr(saved, k)]
    if changed:
        raise UserError(f"--resume: these would change the result of {folder}: {', '.join(changed)}; leave them out")
    last = folder / "last.pt"
    checkpoint = load_model(last)[1] if last.exists() else None
    if checkpoint and "history" not in checkpoint:
        raise UserError(f"--resume: {last} is not a checkpoint of this run; put the run's own back")
    return dataclasses.replace(saved, **{k: v for k, v in given.items() if k in FREE}), checkpoint


def run(settings):
    """Train as the Settings say. Returns the history: one dict an epoch, as in metrics.jsonl (README, "Metrics").

    Raises UserError for whatever the user can mend.
    """
    s, checkpoint = open_run(settings)
    folder, device = Path(s.run_dir), pick_device(s.device)
    s = dataclasses.replace(s, amp=amp_by_default(device) if s.amp is None else s.amp)
    data = load(s.dataset, s.data_dir, s.image_size, evaluate=s.evaluate)
    if device.type == "cuda":                                  # elsewhere the views are made on the CPU
        data.train, data.test = (tuple(t.to(device) for t in part) for part in (data.train, data.test))
    n, C = len(data.train[1]), len(data.classes)
    if s.batch_size > n:
        raise UserError(f"--batch-size {s.batch_size}: there are only {n} training images; give a smaller one")
    teacher, digest = get_teacher(s, data, device) if s.teacher else (None, None)

    torch.manual_seed(s.seed)
    student = create_model(s.student, C, s.image_size).to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(s, student)
    autocast, scaler = mixed_precision(device, s.amp)
    history = []
    if checkpoint:
        check_fits(folder / "last.pt", checkpoint, student, data)
        if checkpoint["teacher_digest"] != digest:
            raise UserError(f"--resume: {folder} was trained with another {s.teacher} teacher; give its --teacher-checkpoint")
        student.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:                               # empty from a run without float16
            scaler.load_state_dict(checkpoint["scaler"])
        history = checkpoint["history"]

    print(f"data      {s.dataset}: {n} training and {len(data.test[1])} {PARTS[s.evaluate]} images, {C} classes, {s.image_size} px")
    print(in_words(s))
    print(f"device    {device.type}, {'mixed precision (' + str(autocast.fast_dtype)[6:] + ')' if s.amp else 'float32'}; run folder {folder}")
    if s.batch_size != 64 and settings.lr is None and s.optimizer == "sgd":
        print(f"note      batch {s.batch_size} is not the recipe's 64; linear scaling would give --lr {s.lr * s.batch_size / 64:g} "
              f"instead of {s.lr:g} (not applied)")
    with lock(folder):
        train_in(folder, s, data, student, teacher, digest, optimizer, scaler, autocast, history)
    print(f"\nlast epoch {history[-1][s.evaluate + '_top1']:.2f} %, best {history[-1]['best_top1']:.2f} % (selected on {s.evaluate}); python eval.py {folder / 'last.pt'}")
    return history


def train_in(folder, s, data, student, teacher, digest, optimizer, scaler, autocast, history):
    """The epochs that `history` lacks. What is in the folder is whole at any moment: each file is renamed into place."""
    for left_over in folder.glob("*.tmp"):                     # of a process that was killed while writing
        left_over.unlink()
    device = next(student.parameters()).device
    if not s.resume:
        if (folder / "config.json").exists():
            raise UserError(f"--run-dir {folder}: another process has just put a run there; give another")
        write_json(folder / "config.json", dataclasses.asdict(s))        # first: with it the run can be resumed
    if not (folder / "env.json").exists():
        write_json(folder / "env.json", environment(device) | dict(teacher_digest=digest))
    print("swap%     rows whose top class is not the label: of the teacher on weak (Tw) and strong (Ts) views, of the student (S)")
    print("\n" + header(s.evaluate))

    objective, network = make_objective(s), compiled(student, device) if s.compile else student
    try:
        for epoch in range(len(history) + 1, s.epochs + 1):
            start = time.perf_counter()
            sums, skipped = train_epoch(s, epoch, network, teacher, objective, data, optimizer, scaler, autocast)
            seconds = time.perf_counter() - start
            if not all(v.isfinite().all() for v in student.state_dict().values()):
                raise UserError(f"epoch {epoch}: the weights are not finite any more; what was saved still loads; try a smaller --lr")
            measured = measure(predict(student, data.test[0], data.mean, data.std), data.test[1])
            losses_ = {k: v for k, v in sums.items() if k.startswith("loss_")}
            swaps = {k: 100 * v for k, v in sums.items() if k.startswith("swap_teacher")}
            wrong = [v for k, v in sums.items() if k.startswith("swap_student")]
            best = max([row["best_top1"] for row in history] + [measured["top1"]])
            row = dict(epoch=epoch, lr=optimizer.param_groups[0]["lr"], loss=sum(losses_.values()), **losses_,
                       train_top1=100 * (1 - sums["swap_student_weak"]), **{f"{s.evaluate}_{k}": measured[k] for k in ("top1", "top5", "nll")},
                       best_top1=best, **swaps, swap_student=100 * sum(wrong) / len(wrong),
                       skipped_steps=skipped, seconds=seconds, images_per_second=len(data.train[1]) / seconds)
            saved = dict(architecture=s.student, image_size=s.image_size, dataset=s.dataset, data_dir=s.data_dir, classes=data.classes,
                         mean=data.mean, std=data.std, method=s.method, seed=s.seed, epoch=epoch, evaluate=s.evaluate, top1=measured["top1"],
                         model={k: v.cpu() for k, v in student.state_dict().items()})
            if measured["top1"] == best:
                write_checkpoint(folder / "best.pt", saved)
            write_checkpoint(folder / "last.pt", saved | dict(optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                                                              teacher_digest=digest, history=history + [row]))
            history.append(row)
            write_metrics(folder, history)
            print(epoch_line(row, s.evaluate), flush=True)
        write_metrics(folder, history)                         # a resumed run may have nothing else left to do
    except torch.OutOfMemoryError:
        raise UserError(f"--batch-size {s.batch_size}: the memory of the GPU is full; try --batch-size {max(1, s.batch_size // 2)}")
    except KeyboardInterrupt as stop:
        stop.add_note(f"python train.py --resume --run-dir {shlex.quote(str(folder))} goes on after epoch {len(history)}")
        raise
    except OSError as error:
        safe = f"epoch {len(history)} is safe: --resume --run-dir {folder} goes on after it" if (folder / "last.pt").exists() else "no epoch is saved there"
        raise UserError(f"{folder}: cannot write epoch {len(history) + 1} ({error.strerror or error}); {safe}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"train.py: {message}; see --help\n")
    for field in dataclasses.fields(Settings):
        options = dict(field.metadata)
        kind = options.pop("type")
        if kind is bool:
            action = "store_true" if field.name == "resume" else argparse.BooleanOptionalAction
            parser.add_argument(flag(field.name), action=action, default=None, help=options["help"])
        else:
            parser.add_argument(flag(field.name), type=kind, **options)

    def terminate(number, frame):
        raise KeyboardInterrupt(128 + number)
    try:
        settings = Settings(**vars(parser.parse_args()))
        signal.signal(signal.SIGTERM, terminate)
        run(settings)
    except UserError as error:
        parser.exit(2, f"train.py: {error}\n")
    except OSError as error:                                   # a full disk, a folder without permission
        parser.exit(2, f"train.py: {error.filename or 'the run folder'}: {error.strerror or error}\n")
    except KeyboardInterrupt as stop:                          # Ctrl-C has no argument
        note = getattr(stop, "__notes__", ["nothing was saved yet"])[0]
        parser.exit(stop.args[0] if stop.args else 130, f"\ntrain.py: interrupted; {note}\n")


if __name__ == "__main__":
    main()
