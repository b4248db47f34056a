"""Train a student:  python train.py --method sld   (or ce, kd, dkd, rld; ce has no teacher).

Every setting is a flag; what is left out takes the recipe of the method and the data set. A run
leaves config.json, env.json, metrics.jsonl, curves.png, last.pt and best.pt in runs/<name>. In a
notebook:
    history = train.run(train.Settings(method="kd", epochs=2))
"""
import argparse
import contextlib
import dataclasses
import hashlib
import inspect
import io
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import filelock
import torch
import torch.distributed as dist
import torchvision
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import losses
from data import DATASETS, SIDES, batches, load
from eval import measure, predict
from folders import UserError, blaming, locked, replacing
from models import MODELS, TORCHVISION, check_name, check_size, create_model
from support.checkpoints import load_model
from support.cuda_graph import Recorded
from support.devices import layout, pick_device
from support.plots import plot
from support.tables import MAY_CHANGE_ON_RESUME, read_run
from swap import misclassified

# --- Settings -------------------------------------------------------------------------------------
# Bounds: in words, and as a test of one number. Numbers beyond them overflow, or train nothing.
COUNT = "from 1 to a billion", lambda v: 1 <= v <= 10 ** 9
POSITIVE = "above 0, at most a million", lambda v: 0 < v <= 10 ** 6
NOT_NEGATIVE = "from 0 to a million", lambda v: 0 <= v <= 10 ** 6
TEMPERATURE = "from 0.01 to 10000", lambda v: 0.01 <= v <= 10 ** 4
LOGIT = "from -10000 to 10000", lambda v: abs(v) <= 10 ** 4
DECAY = "from 0 to 1", lambda v: 0 <= v <= 1
SEED = "from 0 to 2^32 - 1", lambda v: 0 <= v < 2 ** 32


def setting(help, type=str, bounds=None, **more):
    """A field of Settings: its line in --help, its type and its bounds."""
    return dataclasses.field(default=None, metadata=dict(more, help=help, type=type, bounds=bounds))


@dataclasses.dataclass(frozen=True)
class Settings:
    """All of an experiment. None means the value of the recipe; `resolve` fills it in."""
    method: str = setting("what is minimised; default sld", choices=tuple(losses.OBJECTIVES))
    dataset: str = setting("default glyphs, rendered here, no download", choices=DATASETS)
    data_dir: str = setting("where the data is or is cached; default data", metavar="DIR")
    image_size: int = setting("side in pixels, for folder and imagenet; 224, on a folder with our "
                              "own networks 64", int, COUNT, metavar="PX")
    evaluate: str = setting("measure on the test part, or on val, a tenth of the training images, "
                            "which is then not trained on; default test", choices=("test", "val"))
    teacher: str = setting("teacher network", metavar="NAME")
    teacher_checkpoint: str = setting("its weights; default: trained first, or cached; on imagenet "
                                      "those of torchvision", metavar="FILE")
    student: str = setting(f"one of {', '.join(MODELS)}, or a classifier of torchvision.models by "
                           "its name there", metavar="NAME")
    pretrained: bool = setting("teacher and student start from torchvision's ImageNet weights; on "
                               "for its networks on a folder", bool)
    views: str = setting("weak (crop, flip) or both, weak and strong; both for sld",
                         choices=("weak", "both"))
    temperatures: tuple = setting("T of the KL; 4 for kd, 1 2 3 4 5 6 for sld", float, TEMPERATURE,
                                  nargs="+", metavar="T")
    gamma: int = setting("the student swap starts after this epoch; 150 of 240", int, NOT_NEGATIVE)
    ce_weight: float = setting("weight of CE; 0.1, for dkd and rld 1", float, NOT_NEGATIVE)
    kd_weight: float = setting("weight of the KL terms; 0.9", float, NOT_NEGATIVE)
    teacher_fix: str = setting("what is done to the teacher's logits; swap, on both views",
                               choices=("swap", "swap-strong", "add", "none"))
    omega: float = setting("logit units added to the label's, for --teacher-fix add", float, LOGIT)
    student_swap: bool = setting("the swapped student teaches too; on", bool)
    detach: bool = setting("stop the gradient through the pseudo-teacher; off, as released", bool)
    standardize: bool = setting("standardize logits before the temperature; off", bool)
    alpha: float = setting("weight of the label's part of dkd and rld; 1", float, NOT_NEGATIVE)
    beta: float = setting("weight of the other classes' part; 8", float, NOT_NEGATIVE)
    temperature: float = setting("T of dkd and rld; 4", float, TEMPERATURE)
    alpha_temperature: float = setting("T of the label's part of rld; 1", float, TEMPERATURE)
    kd_warmup: float = setting("epochs until dkd and rld count in full; 20 of 240", float, POSITIVE)
    epochs: int = setting("240 on CIFAR, 100 on imagenet, 60 on a folder, pretrained 10, 9 on "
                          "glyphs, 16 there with adamw", int, COUNT)
    batch_size: int = setting("images a step; default 64, on imagenet 512", int, COUNT)
    optimizer: str = setting("sgd, with momentum 0.9; adamw for a ViT", choices=("sgd", "adamw"))
    lr: float = setting("0.05, for sld 0.025; with adamw 0.001; own ones on glyphs, on imagenet "
                        "and for pretrained networks", float, POSITIVE)
    weight_decay: float = setting("on all parameters; 5e-4, on imagenet and pretrained 1e-4, with "
                                  "adamw 0.05", float, DECAY)
    schedule: str = setting("step: x0.1 after 150, 180, 210 of 240 epochs, on imagenet 30, 60, 90 "
                            "of 100; cosine on glyphs, pretrained and with adamw",
                            choices=("step", "cosine"))
    warmup: float = setting("epochs of linear warm-up; 0; a tenth of all on glyphs and pretrained",
                            float, NOT_NEGATIVE)
    seed: int = setting("of initial weights, order and views; default 0", int, SEED)
    device: str = setting("default auto", choices=("auto", "cpu", "cuda", "mps"))
    amp: bool = setting("mixed precision; on for CUDA and CPUs with bfloat16 instructions", bool)
    cuda_graph: bool = setting("CUDA: record each epoch's step as one graph; off", bool)


# --- Recipes --------------------------------------------------------------------------------------
# The numbers of an objective are the defaults of its function in losses.py; here is what else
# differs. ce and kd are the field's (RepDistiller), the others their papers' released code.
COMMON = dict(method="sld", dataset="glyphs", data_dir="data", evaluate="test", seed=0,
              device="auto")
METHODS = dict.fromkeys(losses.OBJECTIVES, dict(views="weak", lr=0.05))
METHODS["sld"] = dict(views="both", lr=0.025)
SIZES = {
    "glyphs": dict(teacher="resnet14", student="resnet8", epochs=9, batch_size=64),
    "cifar10": dict(teacher="resnet56", student="resnet20", epochs=240, batch_size=64),
    "cifar100": dict(teacher="resnet56", student="resnet20", epochs=240, batch_size=64),
    "folder": dict(teacher="resnet20", student="resnet8", epochs=60, batch_size=64),
    "imagenet": dict(teacher="resnet34", student="resnet18", epochs=100, batch_size=512),
}
# Where a teacher that is trained first has a recipe of its own, by its optimiser: that of sgd is
# from results/tuning-teacher, adamw's not tuned. Elsewhere a teacher takes the student's epochs.
TEACHERS = {"glyphs": {"sgd": dict(epochs=12, lr=0.2),
                       "adamw": dict(epochs=64, lr=1e-3, views="both")}}
OPTIMIZERS = {
    "sgd": dict(schedule="step", weight_decay=5e-4, warmup=0.0),
    "adamw": dict(schedule="cosine", weight_decay=0.05, lr=1e-3),
}
# For glyphs, on its validation part: results/tuning, -dkd, -rld, and -vit for adamw (ce, kd, sld).
TUNED = {
    "sgd": dict(lr=dict(ce=0.4, kd=0.4, sld=0.1, dkd=0.05, rld=0.1), schedule="cosine",
                warmup=None),
    "adamw": dict(lr=dict.fromkeys(METHODS, 2e-3) | dict(kd=1e-3), epochs=16),
}
# For ImageNet the released code's.
IMAGENET = {"sgd": dict(lr=0.2, weight_decay=1e-4), "adamw": {}}
# For pretrained networks on a folder. The rates of ce, kd and sld: results/tuning-set-a and -b;
# dkd and rld, whose losses are as large as sld's, take its rate. Not tuned with adamw.
FINE_TUNING = {
    "sgd": dict(lr=dict(ce=0.03, kd=0.01, sld=0.003, dkd=0.003, rld=0.003), weight_decay=1e-4,
                epochs=10, schedule="cosine", warmup=None),
    "adamw": dict(lr=1e-4, epochs=10, warmup=None),
}
# Families that train with AdamW.
TRANSFORMERS = ("vit", "swin", "maxvit", "convnext")
# Epochs of the published recipe; gamma's 150 and the 20 of kd_warmup are of the same 240.
MILESTONES, OF = (150, 180, 210), 240
# 30, 60 and 90 of ImageNet's 100 epochs.
MILESTONES_IMAGENET = (72, 144, 216)


def options_of(method):
    """{setting: default} of what an objective of losses.py can be told: its keywords."""
    keywords = [p for p in inspect.signature(losses.OBJECTIVES[method]).parameters.values()
                if p.kind is p.KEYWORD_ONLY and p.name != "epoch"]
    # Settings.warmup is the learning rate's.
    return {"kd_warmup" if p.name == "warmup" else p.name: p.default for p in keywords}


def optimizer_of(network):
    return "adamw" if network.startswith(TRANSFORMERS) else "sgd"


def flag(name):
    return "--" + name.replace("_", "-")


def check_values(s):
    """{name: value} of what is not None. Raises UserError for a wrong type, word or range."""
    given = {k: str(v) if isinstance(v, Path) else v for k, v in vars(s).items() if v is not None}
    fields = {f.name: f.metadata for f in dataclasses.fields(s)}
    for key, value in given.items():
        kind, bounds, choices, several = (fields[key].get(k) for k in (
            "type", "bounds", "choices", "nargs"))
        if several and not isinstance(value, (tuple, list)):
            raise UserError(f"{flag(key)} {value!r}: must be a list")
        for one in value if several else [value]:
            right = isinstance(one, (int, float) if kind is float else kind)
            if not right or isinstance(one, bool) != (kind is bool):
                raise UserError(f"{flag(key)} {one!r}: must be of type {kind.__name__}")
            if choices and one not in choices:
                raise UserError(f"{flag(key)} {one}: unknown; choose among {', '.join(choices)}")
            if bounds and not bounds[1](one):
                raise UserError(f"{flag(key)} {one}: must be {bounds[0]}")
    return given


def resolve(s):
    """Settings with every None filled from the recipes. Raises UserError for nonsense."""
    given = check_values(s)
    method, dataset = (given.get(k, COMMON[k]) for k in ("method", "dataset"))
    every = {name for m in METHODS for name in options_of(m)} | {"teacher", "teacher_checkpoint"}
    known = {*options_of(method)} | ({"teacher", "teacher_checkpoint"} if method != "ce" else set())
    foreign = ", ".join(flag(k) for k in given if k in every - known)
    if foreign:
        raise UserError(f"{foreign}: no part of --method {method}; leave it out, or choose another "
                        "method")
    networks = {"student": given.get("student", SIZES[dataset]["student"])}
    if method != "ce":
        networks["teacher"] = given.get("teacher", SIZES[dataset]["teacher"])
    for role, name in networks.items():
        with blaming(f"{flag(role)} "):
            check_name(name)
    theirs = [name for name in networks.values() if name in TORCHVISION]
    pretrained = given.get("pretrained", dataset == "folder") if theirs else None
    side = 224 if theirs and dataset == "folder" else SIDES[dataset]

    optimizer = given.get("optimizer", optimizer_of(networks["student"]))
    tuned = {"glyphs": TUNED, "imagenet": IMAGENET}.get(dataset, {}).get(optimizer, {})
    if pretrained and dataset == "folder" and networks["student"] in TORCHVISION:
        tuned = FINE_TUNING[optimizer]
    if isinstance(tuned.get("lr"), dict):
        tuned = tuned | dict(lr=tuned["lr"].get(method, METHODS[method]["lr"]))
    if dataset == "imagenet" and method in ("kd", "sld"):
        tuned = tuned | dict(ce_weight=0.5, kd_weight=0.5)

    # Later ones win: the method's rate is for SGD, the optimiser's own is for any method.
    full = dict.fromkeys(f.name for f in dataclasses.fields(Settings))
    full |= COMMON | SIZES[dataset] | dict(image_size=side, optimizer=optimizer)
    full |= options_of(method) | METHODS[method] | OPTIMIZERS[optimizer] | tuned | given
    full["pretrained"] = pretrained
    if method == "ce":
        full["teacher"] = None
    epochs = full["epochs"]
    if full["warmup"] is None:
        full["warmup"] = epochs / 10
    if not full["student_swap"]:
        full["gamma"] = None
    elif "gamma" not in given:
        full["gamma"] = min(round(full["gamma"] * epochs / OF), epochs - 1)
    if full["kd_warmup"] is not None and "kd_warmup" not in given:
        full["kd_warmup"] *= epochs / OF
    if full["temperatures"] is not None:
        full["temperatures"] = tuple(full["temperatures"])

    for wrong, message in (
        (full["temperatures"] == (), "--temperatures: give at least one"),
        (full["warmup"] >= epochs,
         f"--warmup {full['warmup']:g}: must be shorter than the {epochs} epochs"),
        (not theirs and "pretrained" in given,
         f"--pretrained: there are no weights for {', '.join(networks.values())}; leave it out, or "
         "choose networks of torchvision.models"),
        (not full["student_swap"] and ("gamma" in given or given.get("detach")),
         "--gamma, --detach: part of the student swap; leave out --no-student-swap or them"),
        (full["student_swap"] and full["gamma"] >= epochs,
         f"--gamma {full['gamma']}: the student swap would never start in a run of {epochs} "
         f"epochs; give 0 to {epochs - 1}, or --no-student-swap"),
        ((full["teacher_fix"] == "add") != (full["omega"] is not None),
         "--omega: give it with --teacher-fix add, and only there"),
        (full["teacher_fix"] == "swap-strong" and full["views"] == "weak",
         "--teacher-fix swap-strong: there is no strong view; give --views both"),
    ):
        if wrong:
            raise UserError(message)
    for name in networks.values():
        with blaming(f"--image-size {full['image_size']}: "):
            check_size(name, full["image_size"])
    return Settings(**full)


def learning_rate(s, done):
    """The rate when `done` epochs are done, fractions within an epoch. s: resolved Settings."""
    if done < s.warmup:
        return s.lr * done / s.warmup
    if s.schedule == "cosine":
        return s.lr * 0.5 * (1 + math.cos(math.pi * (done - s.warmup) / (s.epochs - s.warmup)))
    return s.lr * 0.1 ** sum(done >= m for m in drops(s))


def drops(s):
    """The epochs after which the schedule "step" goes down."""
    milestones = MILESTONES_IMAGENET if s.dataset == "imagenet" else MILESTONES
    return sorted({round(m * s.epochs / OF) for m in milestones})


def make_objective(s, view):
    """f(student_logits, teacher_logits, target, epoch) -> named terms of a view, weak or strong."""
    if s.method == "ce":
        return lambda z_s, z_t, y, epoch: losses.ce(z_s, y)
    objective = losses.OBJECTIVES[s.method]
    takes_epoch = "epoch" in inspect.signature(objective).parameters
    options = {"warmup" if name == "kd_warmup" else name: getattr(s, name)
               for name in options_of(s.method)}
    if options.get("teacher_fix") == "swap-strong":
        options["teacher_fix"] = "swap" if view == "strong" else "none"
    if not takes_epoch:
        return lambda z_s, z_t, y, epoch: objective(z_s, z_t, y, **options)
    return lambda z_s, z_t, y, epoch: objective(z_s, z_t, y, epoch=epoch, **options)


# --- One epoch ------------------------------------------------------------------------------------

@dataclasses.dataclass
class Learner:
    """What a run works with: the networks on their device, and what moves the student.
    parallel: the student, under torchrun in DistributedDataParallel, which averages gradients."""
    student: torch.nn.Module
    parallel: torch.nn.Module
    teacher: torch.nn.Module
    teacher_digest: str
    optimizer: torch.optim.Optimizer
    autocast: torch.autocast
    scaler: torch.amp.GradScaler


def take_step(s, epoch, learner, objectives, views, target, rows, share):
    """Forward, loss and backward of one batch; the optimiser then moves the student.

    views: one or two of (B, 3, S, S); target: (B,); objectives: of each view. rows: how many of the
    B count, all but under torchrun. share: what the loss is multiplied by before backward.
    Returns {name: 0-d tensor}: the loss, and sums over the rows of its terms and of the mistakes.
    Nothing in here waits for a GPU.
    """
    # (S6)  L = sum over the views of  a CE + b ( L_TS + 1[epoch > gamma] L_SS ),  in float32.
    # The student takes the views one by one, weak first, each with its own batch statistics. The
    # teacher, frozen, takes both at once: in eval mode no row touches another.
    z_t = [None] * len(views)
    with learner.autocast:
        z_s = [learner.parallel(view).float() for view in views]                   # (B, C) each
        if learner.teacher:
            z_t = learner.teacher(torch.cat(views)).float().split(len(target))     # (B, C) each
    terms = {}
    for objective, student_logits, teacher_logits in zip(objectives, z_s, z_t):
        for name, term in objective(student_logits, teacher_logits, target, epoch).items():
            terms[name] = terms.get(name, 0) + term
    loss = sum(terms.values())
    learner.optimizer.zero_grad()
    learner.scaler.scale(loss * share).backward()

    numbers = {"loss": loss.detach()} | {f"loss_{k}": v.detach() * rows for k, v in terms.items()}
    for who, logits in (("student", z_s), ("teacher", z_t)):
        for view, z in zip(("weak", "strong"), logits):
            if z is not None:
                wrong = misclassified(z.detach(), target)[:rows]
                numbers[f"swap_{who}_{view}"] = wrong.sum().float()
    return numbers


def train_epoch(s, epoch, learner, data):
    """One pass over the training part. Returns the epoch's numbers as they go into metrics.jsonl:
    {"epoch", "lr", "loss", "loss_<term>", "train_top1", "swap_teacher_<view>", "swap_student", …},
    means over the rows, shares in percent. s: resolved Settings. Raises UserError where the loss is
    not finite; what the student has moved by it is never saved.
    """
    student = learner.parallel
    device = next(student.parameters()).device
    objectives = [make_objective(s, view) for view in ("weak", "strong")]
    rank, world = process()
    n, start = len(data.train[1]), time.perf_counter()
    steps, waiting, sums, names, moves = math.ceil(n / s.batch_size), [], [], [], []
    # The scaler leaves a step out by not calling the optimiser.
    hook = learner.optimizer.register_step_post_hook(lambda *_: moves.append(1))
    student.train()
    # For the dropout of some networks, so that a resumed run draws the same.
    torch.manual_seed((1_000_003 * s.seed + epoch) * world + rank)
    # Views for MPS are made on the CPU.
    where = device if device.type == "cuda" else torch.device("cpu")

    def compute(*tensors, rows=None, share=1.0):
        *views, target = tensors
        rows = len(target) if rows is None else rows
        numbers = take_step(s, epoch, learner, objectives, views, target, rows, share)
        names[:] = numbers
        return torch.stack([*numbers.values()])

    recorded = Recorded(compute, student.parameters()) if s.cuda_graph else None
    bar = tqdm(batches(data, s.batch_size, s.views, s.seed, epoch, rank, world, where),
               f"epoch {epoch}", steps, leave=False, disable=True if rank else None)
    for step, (views, target) in enumerate(bar):
        views = [v.to(device, memory_format=layout(device)) for v in views]        # (B, 3, S, S)
        target = target.to(device)                                                 # (B,)
        # In the middle of the step, so that a warm-up does not begin with a rate of 0.
        lr = learning_rate(s, epoch - 1 + (step + 0.5) / steps)
        for group in learner.optimizer.param_groups:
            group["lr"] = lr
        if world > 1:
            # This process has `rows` of the batch's `whole`. The processes' mean of the shares is
            # the mean over the whole batch.
            whole = min(s.batch_size, n - step * s.batch_size)
            rows = len(range(rank, whole, world))
            numbers = compute(*views, target, rows=rows, share=rows * world / whole)
        else:
            numbers = (recorded or compute)(*views, target)
        learner.scaler.step(learner.optimizer)
        learner.scaler.update()
        waiting.append(numbers)
        if len(waiting) == 64 or step + 1 == steps:
            # Read seldom, since a GPU waits for it.
            for at, row in enumerate(torch.stack(waiting).tolist(), step + 1 - len(waiting)):
                if not math.isfinite(row[0]):
                    lr = learning_rate(s, epoch - 1 + (at + 0.5) / steps)
                    raise UserError(f"epoch {epoch}, step {at + 1} of {steps}, lr {lr:g}: the loss "
                                    f"is not finite; {remedy(s)}")
                sums = [a + b for a, b in zip(sums or [0] * len(row), row)]
            waiting.clear()
    hook.remove()
    if world > 1:
        total = torch.tensor(sums, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        sums = total.tolist()
    seconds = time.perf_counter() - start
    return summary(epoch, lr, dict(zip(names, sums)), n, steps - len(moves), seconds)


def summary(epoch, lr, sums, n, skipped, seconds):
    """The numbers of an epoch of n images, of the sums of what `take_step` returns."""
    means = {name: value / n for name, value in sums.items() if name != "loss"}
    # The student's misclassified rows on the weak view and, where there is one, on the strong.
    wrong = [means.pop(k) for k in ("swap_student_weak", "swap_student_strong") if k in means]
    loss_terms = {name: value for name, value in means.items() if name.startswith("loss_")}
    swaps = {name: 100 * value for name, value in means.items() if name.startswith("swap_")}
    return dict(epoch=epoch, lr=lr, loss=sum(loss_terms.values()), **loss_terms, **swaps,
                train_top1=100 * (1 - wrong[0]), swap_student=100 * sum(wrong) / len(wrong),
                skipped_steps=skipped, seconds=seconds, images_per_second=n / seconds)


def remedy(s):
    return f"try a smaller --lr{' or --no-amp' if s.amp else ''}"


# --- A run ----------------------------------------------------------------------------------------

def run(settings, run_dir=None, resume=False):
    """Train as the Settings say. Returns the history: one dict an epoch, as in metrics.jsonl.

    run_dir: a new folder; default runs/<dataset>-<method>-<student>-seed<seed>. resume: go on from
    run_dir/last.pt, with that run's own settings. The metrics are defined in results/README.md.
    Raises UserError for whatever the user can mend.
    """
    s, folder, saved = open_run(settings, run_dir, resume)
    rank, world = process()
    if world > 1:
        # All have looked into the folder before the first writes there.
        dist.barrier()
    device = pick_device(s.device)
    if world > 1:
        # As several_processes chose.
        device = pick_device("cuda" if dist.get_backend() == "nccl" else "cpu")
    s = dataclasses.replace(s, amp=amp_by_default(device) if s.amp is None else s.amp)
    if s.cuda_graph and (device.type != "cuda" or world > 1):
        raise UserError("--cuda-graph: needs a CUDA device and a single process; leave it out")
    data = load(s.dataset, s.data_dir, s.image_size, evaluate=s.evaluate)
    if device.type == "cuda" and data.area is None:
        # Photographs may be larger than its memory; they go there batch by batch.
        data.train, data.test = (tuple(t.to(device) for t in p) for p in (data.train, data.test))
    n = len(data.train[1])
    if s.batch_size > n:
        raise UserError(f"--batch-size {s.batch_size}: there are only {n} training images")
    if s.batch_size < world:
        raise UserError(f"--batch-size {s.batch_size}: less than one image for each of {world} "
                        "processes; give a larger one, or fewer processes")
    if (n % s.batch_size or s.batch_size) // world <= 1:
        # Batch norm may have nothing to average over.
        with blaming(f"--batch-size {s.batch_size}: leaves one image for the last step: "):
            check_size(s.student, s.image_size, images=1)

    learner, history = begin(s, data, device, saved)
    print(f"data      {s.dataset}: {n} training and {len(data.test[1])} {PARTS[s.evaluate]} "
          f"images, {len(data.classes)} classes, {s.image_size} px\n{in_words(s)}")
    half = str(learner.autocast.fast_dtype).removeprefix("torch.")
    precision = f"mixed precision ({half})" if s.amp else "float32"
    processes = f" in {world} processes" if world > 1 else ""
    print(f"device    {device.type}{processes}, {precision}; run folder {folder}")
    with contextlib.nullcontext() if rank else lock(folder), explained(s, folder, history):
        if rank == 0:
            open_folder(folder, s, data, learner, resume)
        print("swap%     rows whose top class is not the label: of the teacher on weak (Tw) and "
              f"strong (Ts) views, of the student (S)\n\n{header(s.evaluate)}")
        for epoch in range(len(history) + 1, s.epochs + 1):
            row = train_epoch(s, epoch, learner, data)
            if not all(v.isfinite().all() for v in learner.student.state_dict().values()):
                raise UserError(f"epoch {epoch}: the weights are not finite; {remedy(s)}")
            if rank:
                history.append(row)
                continue
            logits = predict(learner.student, data.test[0], data.mean, data.std)
            measured = measure(logits, data.test[1])
            row |= {f"{s.evaluate}_{k}": measured[k] for k in ("top1", "top5", "nll")}
            row["best_top1"] = max([r["best_top1"] for r in history] + [measured["top1"]])
            save(folder, s, data, learner, history + [row])
            # Only now, since `explained` counts what is saved.
            history.append(row)
            write_metrics(folder, history)
            print(epoch_line(row, s.evaluate), flush=True)
        if rank:
            return history
        # Here too: a run that was killed after its last checkpoint lacks a line.
        write_metrics(folder, history)
        curves = io.BytesIO()
        plot([folder]).savefig(curves)
        write(folder / "curves.png", curves.getvalue())
    last, best = (history[-1][key] for key in (s.evaluate + "_top1", "best_top1"))
    print(f"\nlast epoch {last:.2f} %, best {best:.2f} % (selected on {s.evaluate}); "
          f"python eval.py {shlex.quote(str(folder / 'last.pt'))}")
    return history


def begin(s, data, device, saved):
    """(Learner, history) of a new run, or of one that goes on from the checkpoint `saved`."""
    torch.manual_seed(s.seed)
    C, pretrained = len(data.classes), s.pretrained and s.student in TORCHVISION and not saved
    with blaming("--student "):
        student = create_model(s.student, C, s.image_size, pretrained)
    if pretrained:
        print(f"student   {s.student} from torchvision's ImageNet weights"
              + (f", with a new last layer for {C} classes" if C != 1000 else ""))
    teacher, digest = get_teacher(s, data, device) if s.teacher else (None, None)
    student.to(device, memory_format=layout(device))
    parallel, world = student, process()[1]
    if world > 1:
        # Batch norm's statistics stay each process's own; those of the first are saved. The warning
        # is of the keyword's new name, which older versions do not know.
        with warnings.catch_warnings(action="ignore"):
            parallel = DistributedDataParallel(student, broadcast_buffers=False)
    learner = Learner(student, parallel, teacher, digest, make_optimizer(s, student),
                      *mixed_precision(device, s.amp))
    if not saved:
        return learner, []
    if saved["teacher_digest"] != digest:
        raise UserError("--resume: the run had another teacher; give its --teacher-checkpoint")
    if saved.get("data", data.digests) not in (data.digests, list(data.digests or ())):
        raise UserError(f"--data-dir {s.data_dir}: not the images of this run (names or "
                        "pixels differ); put them back, or start anew")
    if saved.get("processes", world) != world:
        print(f"note      begun in {saved['processes']} processes, which give other numbers "
              f"than {world}")
    student.load_state_dict(saved["model"])
    learner.optimizer.load_state_dict(saved["optimizer"])
    # Empty from a run without float16.
    if saved["scaler"]:
        learner.scaler.load_state_dict(saved["scaler"])
    return learner, saved["history"]


def open_run(settings, run_dir, resume):
    """(resolved Settings, folder, checkpoint to go on from or None). Raises UserError where the
    folder holds another run, or none to go on with."""
    if not resume:
        s = resolve(settings)
        name = f"runs/{s.dataset}-{s.method}-{s.student}-seed{s.seed}"
        numbered = (Path(f"{name}-{k}" if k > 1 else name) for k in range(1, 10**6))
        folder = Path(run_dir or next(path for path in numbered if not path.exists()))
        inside = folder.iterdir() if folder.is_dir() else ()
        if any(path.name != "lock" and not is_left_over(path) for path in inside):
            again = ", or --resume to go on" if (folder / "config.json").exists() else ""
            raise UserError(f"--run-dir {folder}: already holds a run or other files; give "
                            f"another{again}")
        # Before a teacher is trained for it.
        above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise UserError(f"--run-dir {folder}: {above} is no folder that can be written to; "
                            "give another")
        return s, folder, None
    if run_dir is None:
        raise UserError("--resume: say which run with --run-dir")
    folder = Path(run_dir)
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        saved = resolve(Settings(**config))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"--resume: {folder} holds no run to go on with (config.json: {error}); "
                        "start anew with another --run-dir, or remove this one")
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(settings).items()}
    changed = [f"{flag(k)} {getattr(saved, k)} -> {v}" for k, v in given.items()
               if v not in (None, getattr(saved, k))
               and (k not in MAY_CHANGE_ON_RESUME
                    or k == "teacher_checkpoint" and saved.method == "ce")]
    if changed:
        raise UserError(f"--resume: these would change the result of {folder}: "
                        f"{', '.join(changed)}; leave them out")
    last = folder / "last.pt"
    if not last.exists() and (folder / "metrics.jsonl").exists():
        raise UserError(f"--resume: {last} is gone, so nothing can go on; put it back, or start "
                        "anew with another --run-dir")
    checkpoint = load_model(last)[1] if last.exists() else None
    if checkpoint and not is_of(checkpoint, saved):
        raise UserError(f"--resume: {last} is not a checkpoint of this run; put the run's own back")
    free = {k: given[k] for k in MAY_CHANGE_ON_RESUME if given[k] is not None}
    return resolve(dataclasses.replace(saved, **free)), folder, checkpoint


def is_of(checkpoint, s):
    """Whether it is one of the run with these Settings. An older one may not have all of them."""
    theirs = checkpoint.get("settings")
    # JSON has one form for lists and tuples.
    return isinstance(theirs, dict) and all(
        json.dumps(v, default=str) == json.dumps(getattr(s, k, None)) for k, v in theirs.items()
        if k not in MAY_CHANGE_ON_RESUME and v is not None)


COLUMNS = (  # heading, key, width, format
    ("epoch", "epoch", 5, "d"), ("lr", "lr", 8, ".2g"), ("ce", "loss_ce", 7, ".3f"),
    ("teacher", "loss_teacher", 8, ".3f"), ("student", "loss_student", 8, ".3f"),
    ("train%", "train_top1", 7, ".2f"), ("{part}%", "{part}_top1", 6, ".2f"),
    ("best%", "best_top1", 6, ".2f"), ("swapTw%", "swap_teacher_weak", 8, ".2f"),
    ("swapTs%", "swap_teacher_strong", 8, ".2f"), ("swapS%", "swap_student", 7, ".2f"),
    ("sec", "seconds", 7, ".1f"), ("img/s", "images_per_second", 7, ".0f"))
PARTS = dict(test="test", val="validation")


def header(part):
    """The heading of the epochs' lines. part: "test" or "val", as in Settings.evaluate."""
    return " ".join(heading.format(part=part).rjust(width) for heading, _, width, _ in COLUMNS)


def epoch_line(row, part):
    """One fixed-width line under the header; what the method does not have shows as a dash."""
    cells = ((key.format(part=part), width, form) for _, key, width, form in COLUMNS)
    return " ".join((format(row[key], form) if key in row else "-").rjust(width)
                    for key, width, form in cells)


def in_words(s):
    """The resolved experiment, one line for each of its parts."""
    loss = "CE(label)" if s.method == "ce" else f"losses.{s.method}"
    if s.method in ("dkd", "rld"):
        parts = dict(dkd=("label against the rest", "the other classes"),
                     rld=("teacher's certainty", "the classes below the label"))[s.method]
        loss = (f"{s.ce_weight:g} CE(label) + {s.alpha:g} T^2 KL({parts[0]}) + {s.beta:g} T^2 "
                f"KL({parts[1]}) at T = {s.temperature:g}, in full after {s.kd_warmup:g} epochs")
    elif s.method in ("kd", "sld"):
        fixed = {"swap": "swapped teacher", "swap-strong": "teacher, swapped on the strong view",
                 "add": f"teacher + {s.omega} on the label"}
        fixed = fixed.get(s.teacher_fix, "teacher")
        loss = (f"{s.ce_weight:g} CE(label) + {s.kd_weight:g} T^2 KL({fixed} || student) "
                f"at T = {', '.join(f'{T:g}' for T in s.temperatures)}")
    if s.standardize:
        loss += "\n          of standardized logits"
    if s.student_swap:
        loss += (f"\n          + {s.kd_weight:g} T^2 KL(swapped student || student) from epoch "
                 f"{s.gamma + 1} on{', its gradient stopped' if s.detach else ''}")
    falls = [epoch for epoch in drops(s) if epoch < s.epochs]
    after = f"x0.1 after epoch {', '.join(map(str, falls))}" if falls else "constant"
    rate = "cosine to 0" if s.schedule == "cosine" else after
    warmup = f", warm-up {s.warmup:g} epochs" if s.warmup else ""
    views = "weak and strong views" if s.views == "both" else "the weak view"
    return (f"minimise  {loss}\n"
            f"on        {views} of {s.dataset}, student {s.student}\n"
            f"with      {s.optimizer}, lr {s.lr:g} {rate}{warmup}, weight decay "
            f"{s.weight_decay:g}, {s.epochs} epochs, batch {s.batch_size}, seed {s.seed}")


# --- The teacher ----------------------------------------------------------------------------------

def get_teacher(s, data, device):
    """(the frozen teacher in eval mode, digest of its weights): of --teacher-checkpoint, or on
    imagenet as torchvision publishes it, or the cached one, which is trained first where it lacks
    epochs. Raises UserError for one at chance."""
    published = s.dataset == "imagenet" and s.teacher in TORCHVISION
    path = s.teacher_checkpoint or (s.teacher if published else cached_teacher(s, data))
    teacher, _ = load_model(path, s.teacher, data)
    teacher.requires_grad_(False).to(device, memory_format=layout(device))
    top1 = measure(predict(teacher, data.test[0], data.mean, data.std), data.test[1])["top1"]
    C = len(data.classes)
    # Twice chance means nothing for 2 classes.
    floor, words = min((200 / C, "twice chance"), (100 / C + 10, "ten points above chance"))
    if not top1 > floor:
        more = "" if s.teacher_checkpoint or s.dataset in TEACHERS else ", or more --epochs"
        raise UserError(f"{path}: the teacher has {top1:.2f} % {s.evaluate} top-1, no better than "
                        f"{floor:.2f} % ({words}); give another --teacher-checkpoint{more}")
    origin = "torchvision" if path == s.teacher else path
    print(f"teacher   {s.teacher} from {origin}: {top1:.2f} % {s.evaluate} top-1")
    weights = b"".join(v.cpu().numpy().tobytes() for v in teacher.state_dict().values())
    return teacher, hashlib.sha256(weights).hexdigest()


def cached_teacher(s, data):
    """The last.pt of this data's own teacher, after the epochs that it lacks."""
    name = s.dataset
    if data.area is not None:
        name = f"{Path(s.data_dir).resolve().name}-{s.image_size}px"
    if data.digests:
        # Two folders may share a name: their images tell them apart.
        name += f"-{data.digests[0]}"
    if s.evaluate == "val":
        # The teacher must not know the images that are measured on either.
        name += "-val"
    pretrained = s.pretrained if s.teacher in TORCHVISION else None
    if pretrained:
        name += "-pretrained"
    recipe = dict(epochs=s.epochs)
    if s.dataset in TEACHERS:
        recipe = TEACHERS[s.dataset][optimizer_of(s.teacher)]
    else:
        name += f"-{s.epochs}-epochs"
    folder = Path(f"runs/teacher-{name}-{s.teacher}")
    mine = Settings(data_dir=s.data_dir, device=s.device)
    started = (folder / "config.json").exists()
    if not started:
        batch_size = min(SIZES[s.dataset]["batch_size"], len(data.train[1]))
        mine = dataclasses.replace(
            mine, method="ce", dataset=s.dataset, image_size=s.image_size, student=s.teacher,
            evaluate=s.evaluate, amp=s.amp, batch_size=batch_size, pretrained=pretrained, **recipe)
    elif (folder / "metrics.jsonl").exists():
        config, rows = read_run(folder)
        if len(rows) == config["epochs"]:
            return folder / "last.pt"
    print(f"no {s.teacher} teacher for {name} yet: {'going on with' if started else 'training'} it "
          f"first, in {folder}\n(your own instead: --teacher-checkpoint FILE)\n")
    try:
        run(mine, folder, resume=started)
        if process()[1] > 1:
            # The first process may still be writing.
            dist.barrier()
    except KeyboardInterrupt as stop:
        stop.__notes__ = ["the same command goes on with the teacher"]
        raise
    print()
    return folder / "last.pt"


# --- Device ---------------------------------------------------------------------------------------

def process():
    """(number of this process, number of all): (0, 1) but under torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def amp_by_default(device):
    """Any GPU gains; of CPUs only those with bfloat16 instructions."""
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return device.type == "cuda" or device.type == "cpu" and has_bf16()


def mixed_precision(device, on):
    """(autocast, GradScaler): bfloat16, which needs no scaler; on a GPU without it float16, whose
    small gradients the scaler keeps from underflow."""
    older = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.float16 if older else torch.bfloat16
    scaler = torch.amp.GradScaler(device.type, enabled=on and dtype == torch.float16)
    return torch.autocast(device.type, dtype, enabled=on), scaler


def make_optimizer(s, student):
    common = dict(params=student.parameters(), lr=s.lr, weight_decay=s.weight_decay)
    if s.optimizer == "sgd":
        return torch.optim.SGD(**common, momentum=0.9)
    return torch.optim.AdamW(**common)


# --- Files ----------------------------------------------------------------------------------------

def write(path, content):
    """A file of a run folder, whole at any moment."""
    with replacing(path) as file:
        file.write(content)


def is_left_over(path):
    """Whether it is a file that `write` was writing when its process was killed."""
    ours = r"(config\.json|env\.json|metrics\.jsonl|curves\.png|best\.pt|last\.pt)\.\d+\.tmp"
    return re.fullmatch(ours, path.name) is not None


def write_json(path, value):
    write(path, (json.dumps(value, indent=1) + "\n").encode())


def write_metrics(folder, history):
    write(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history).encode())


def save(folder, s, data, learner, history):
    """best.pt, where this epoch is the best, and last.pt, with what a resumed run needs."""
    row = history[-1]
    top1 = row[s.evaluate + "_top1"]
    student = dict(
        architecture=s.student, image_size=s.image_size, dataset=s.dataset, data_dir=s.data_dir,
        classes=data.classes, mean=data.mean, std=data.std, method=s.method, seed=s.seed,
        epoch=row["epoch"], evaluate=s.evaluate, top1=top1,
        model={k: v.cpu() for k, v in learner.student.state_dict().items()})
    resumable = student | dict(
        optimizer=learner.optimizer.state_dict(), scaler=learner.scaler.state_dict(),
        teacher_digest=learner.teacher_digest, data=data.digests, processes=process()[1],
        history=history, settings=dataclasses.asdict(s))
    for name, content in (("best.pt", student), ("last.pt", resumable)):
        if name == "last.pt" or top1 == row["best_top1"]:
            buffer = io.BytesIO()
            torch.save(content, buffer)
            write(folder / name, buffer.getvalue())


def lock(folder):
    """A context that keeps other processes out of `folder`. Raises UserError where one is in."""
    try:
        return locked(folder / "lock")
    except filelock.Timeout:
        raise UserError(f"{folder}: another process is training there; wait until it is done, or "
                        "give another --run-dir")


def open_folder(folder, s, data, learner, resume):
    """Write config.json and env.json of a new run; tidy up after a process killed in a write."""
    for left_over in filter(is_left_over, folder.iterdir()):
        left_over.unlink()
    if not resume:
        if (folder / "config.json").exists():
            raise UserError(f"--run-dir {folder}: another process has just put a run there")
        # First, since with it the run can be resumed.
        write_json(folder / "config.json", dataclasses.asdict(s))
    if not (folder / "env.json").exists():
        about = environment(next(learner.student.parameters()).device)
        write_json(folder / "env.json", about | dict(teacher_digest=learner.teacher_digest,
                                                     data=data.digests))


@contextlib.contextmanager
def explained(s, folder, history):
    """Whatever ends a run early, in one line that says what is safe and how to go on."""
    launch = f"torchrun --nproc-per-node {process()[1]}" if process()[1] > 1 else "python"
    command = f"{launch} train.py --resume --run-dir {shlex.quote(str(folder))}"
    try:
        yield
    except UserError as error:
        safe = f"epoch {len(history)} is saved" if history else "no epoch was saved"
        raise UserError(f"{error}; {safe}")
    except KeyboardInterrupt as stop:
        stop.add_note(f"{command} goes on after epoch {len(history)}")
        raise
    except OSError as error:
        safe = "no epoch is saved there"
        if (folder / "last.pt").exists():
            safe = f"epoch {len(history)} is safe: {command} goes on after it"
        raise UserError(f"{folder}: cannot write epoch {len(history) + 1} "
                        f"({error.strerror or error}); {safe}")
    except (MemoryError, RuntimeError) as error:
        full = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if full or "allocate memory" in str(error):
            raise UserError(f"--batch-size {s.batch_size}: the memory is full; try "
                            f"--batch-size {max(1, s.batch_size // 2)}")
        # Of gloo or nccl, once a process of this run is gone.
        if not dist.is_initialized():
            raise
        raise UserError(f"{folder}: another process of this run is gone; epoch {len(history)} is "
                        f"safe: {command} goes on after it")


def environment(device):
    """Where a run was made: versions, processor or GPU, threads, commit and command."""
    def output(*command):
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip()
    try:
        commit = output("git", "rev-parse", "HEAD")
        commit += "-dirty" if commit and output("git", "status", "--porcelain", "-uno") else ""
    except OSError:
        # No git here.
        commit = ""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    if not name and Path("/proc/cpuinfo").exists():
        # Linux leaves platform.processor() empty.
        name = re.search(r"model name\s*: (.*)|$", Path("/proc/cpuinfo").read_text())[1]
    return dict(python=platform.python_version(), torch=torch.__version__,
                torchvision=torchvision.__version__, system=platform.system(),
                machine=platform.machine(), device=device.type, device_name=name,
                cpu_capability=torch.backends.cpu.get_cpu_capability(),
                threads=torch.get_num_threads(), processes=process()[1], commit=commit or None,
                command=" ".join(["train.py", *sys.argv[1:]]))


# --- The command line -----------------------------------------------------------------------------

@contextlib.contextmanager
def several_processes(device):
    """Under torchrun: this process joins the others, with a GPU of its own where there are any.
    Only the first one prints."""
    if "WORLD_SIZE" not in os.environ or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    gpu = torch.cuda.is_available() and device != "cpu"
    if gpu:
        if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            raise UserError(f"--nproc-per-node: there are {torch.cuda.device_count()} GPUs here; "
                            "start as many processes, or give --device cpu")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpu else "gloo", device_id=(
        torch.device("cuda", torch.cuda.current_device()) if gpu else None))
    try:
        quiet = io.StringIO() if dist.get_rank() else sys.stdout
        with contextlib.redirect_stdout(quiet):
            yield
        # Else gloo of torch 2.6 may wait for ever to take leave of a first process that has left.
        # Where that one failed it says so itself.
        with contextlib.suppress(RuntimeError):
            dist.barrier()
    finally:
        dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"train.py: {message}; see --help\n")
    for field in dataclasses.fields(Settings):
        options = {k: v for k, v in field.metadata.items() if k != "bounds"}
        if options["type"] is bool:
            options = dict(help=options["help"], action=argparse.BooleanOptionalAction)
        parser.add_argument(flag(field.name), **options)
    parser.add_argument("--run-dir", metavar="DIR",
                        help="default runs/<dataset>-<method>-<student>-seed<seed>, with -2, -3, … "
                        "where that exists")
    parser.add_argument("--resume", action="store_true",
                        help="go on from DIR/last.pt, with the run's own settings")

    # SIGTERM, with which clusters end a job, is then like Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    rank = int(os.environ.get("RANK", 0))
    try:
        given = vars(parser.parse_args())
        run_dir, resume = given.pop("run_dir"), given.pop("resume")
        with several_processes(given["device"]):
            run(Settings(**given), run_dir, resume)
    except UserError as error:
        if rank:
            # Most errors are everybody's; then the first says it, and torchrun ends the others.
            time.sleep(3)
        parser.exit(2, f"train.py: {error}\n")
    except OSError as error:
        # A full disk, a folder without permission.
        where = error.filename or "the run folder"
        parser.exit(2, f"train.py: {where}: {error.strerror or error}\n")
    except KeyboardInterrupt as stop:
        if rank:
            sys.exit(130)
        note = getattr(stop, "__notes__", ["nothing was saved yet"])[0]
        parser.exit(130, f"\ntrain.py: interrupted; {note}\n")


if __name__ == "__main__":
    main()
