"""Measure a classifier:  python eval.py CHECKPOINT;  make a table:  python eval.py --table DIR

A checkpoint of train.py needs no other flag. A foreign one needs --model, --dataset and --data-dir.
The name of a torchvision network in its place stands for the published one; --data-dir holds
ImageNet. Everything is measured in float32 on the test part, so on a CPU the numbers are those of a
CPU run's log.
"""
import argparse
import contextlib
import itertools
import json
import math
import pickle
import re
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torchvision.transforms.v2 import functional as F_vision

from data import DATASETS, PHOTOGRAPHS, load, normalize
from models import MODELS, check_name, check_size, create_model
from support.errors import UserError, as_user_error
from support.networks import TORCHVISION
from support.photographs import centre, read_image, stored_side


def read_checkpoint(path):
    """What torch.load gives, of tensors and plain types only. Raises UserError where it cannot.

    path: a file, or the name of a torchvision network: the published one, as train.py saves it.
    """
    if not path.is_file() and str(path) in TORCHVISION:
        preset = torchvision.models.get_model_weights(str(path)).DEFAULT.transforms()
        size = preset.crop_size[0]
        with as_user_error(""):
            model = create_model(str(path), 1000, size, pretrained=True)
        return dict(architecture=str(path), image_size=size, dataset="imagenet",
                    mean=tuple(preset.mean), std=tuple(preset.std), model=model.state_dict())
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint, nor a network of torchvision.models")
    try:
        # The warning is of another pickle protocol: the file loads, or is refused below.
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: not a PyTorch checkpoint of tensors and plain types; it was not "
                        "loaded")
    except Exception:
        # A damaged file can raise nearly anything.
        raise UserError(f"{path}: not a PyTorch checkpoint, or damaged (empty, cut off, or another "
                        "file type)")


def load_model(path, name=None, data=None):
    """(network in eval mode, checkpoint dict) from a file of train.py, or a foreign state dict:
    bare, or under "model" or "state_dict", with or without "module." before each name; or from the
    name of a torchvision network, as published.

    name: the architecture; needed for a foreign file. data: a Dataset that the network has to fit:
    its classes, and its image size; images normalised as this data says are then what it takes,
    whatever it was trained with. Only tensors and plain types are unpickled. Raises UserError for a
    file that is missing, damaged, no checkpoint, or of another network or data.
    """
    path = Path(path)
    checkpoint = read_checkpoint(path)
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: holds a {type(checkpoint).__name__}, not a state dict")
    inner = [checkpoint[k] for k in ("model", "state_dict") if isinstance(checkpoint.get(k), dict)]
    state = inner[0] if inner else checkpoint
    state = {str(key).removeprefix("module."): value for key, value in state.items()}

    ours = checkpoint.get("architecture")
    if name and ours and name != ours:
        raise UserError(f"{path}: holds a {ours}, not a {name}")
    name = name or ours
    if name is None:
        raise UserError(f"{path}: does not say which network it is; name it with --model")
    size = checkpoint.get("image_size", 224 if name in TORCHVISION else 32)
    with as_user_error(f"{path}: "):
        # The last parameter is the classifier's: C numbers, or C rows.
        *_, last = create_model(name, 2, size).state_dict()
        head = state.get(last)
        if not isinstance(head, torch.Tensor) or head.ndim == 0:
            raise ValueError(f"no classifier weights ({last}), so not a {name}")
        C = len(head)
        model = create_model(name, C, size)
    expected = model.state_dict()
    wrong = sorted(expected.keys() ^ state.keys())
    wrong = wrong or [k for k in expected if expected[k].shape != getattr(state[k], "shape", None)]
    if wrong:
        raise UserError(f"{path}: does not fit a {name}; first mismatches: {', '.join(wrong[:3])}")
    broken = [k for k in expected if not state[k].isfinite().all()]
    if broken:
        raise UserError(f"{path}: {broken[0]} holds NaN or infinity; train it again, or give "
                        "another file")
    model.load_state_dict(state)
    if data is not None:
        if len(data.classes) != C:
            raise UserError(f"{path}: has {C} classes, the data has {len(data.classes)}")
        if checkpoint.get("classes", data.classes) != data.classes:
            raise UserError(f"{path}: was trained on other classes than the data's "
                            f"{data.classes[:3]}…")
        side = data.test[0].shape[-1]
        with as_user_error(f"{path}: a {name} for {size} px, the images have {side}; give another "
                     "checkpoint or --image-size; "):
            # A file of train.py was trained at one size; a published network is used at many.
            if "classes" in checkpoint and size != side:
                raise ValueError("it was trained at no other")
            check_size(name, side, made_for=size)
        with as_user_error(f"{path}: mean and std: "):
            ours = torch.tensor([data.mean, data.std], dtype=torch.float64)
            own = torch.tensor([checkpoint.get("mean", data.mean), checkpoint.get("std", data.std)],
                               dtype=torch.float64)
            if own.shape != ours.shape or not (own.isfinite().all() and own[1].min() > 0):
                raise ValueError("not three numbers each")
        if not torch.equal(own, ours):
            print(f"{path}: sees images normalised as it was trained, by mean and std "
                  f"{own.tolist()}, not by the data's {ours.tolist()}")
            mean, std = ((own[0] - ours[0]) / ours[1]).tolist(), (own[1] / ours[1]).tolist()
            model.register_forward_pre_hook(lambda _, x: (F_vision.normalize(x[0], mean, std),))
    return model.eval(), checkpoint


@torch.inference_mode()
def predict(model, images, mean, std, batch_size=None):
    """Logits (N, C), float32, of uint8 images (N, 3, S, S). Leaves the network in eval mode."""
    model.eval()
    device = next(model.parameters()).device
    # Few images at a time stay in a CPU's cache.
    few = 10 if device.type == "cuda" else 1
    batch_size = batch_size or few * (250 if images.shape[-1] <= 64 else 50)
    parts = (normalize(part.to(device), mean, std) for part in images.split(batch_size))
    logits = [model(x.contiguous(memory_format=layout(device))).float() for x in parts]
    return torch.cat(logits).to(images.device)


def pick_device(name):
    there = dict(cpu=True, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if there[kind])
    if not there[name]:
        raise UserError(f"--device {name}: not available here; leave the flag out or give cpu")
    # Otherwise CUDA rounds float32 convolutions to TF32's 10 bits, and two runs differ.
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
    return torch.device(name)


def layout(device):
    """The memory format of images and weights. On MPS batch norm's backward pass in channels_last
    is wrong, or raises, in many versions of torch (pytorch/pytorch#175189)."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def calibration(logits, labels, bins=15):
    """(count, confidence, right), each (bins,) in float64: of the rows in each of `bins` equal bins
    of confidence, how many, the sum of their confidences, and how many are right (Guo et al.,
    ICML 2017). logits: (N, C); labels: (N,)."""
    confidence, right = F.softmax(logits, 1).amax(1), logits.argmax(1) == labels
    bin_of = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
    empty = torch.zeros(bins, dtype=torch.float64, device=logits.device)
    return tuple(empty.index_add(0, bin_of, values.double())
                 for values in (torch.ones_like(confidence), confidence, right))


def measure(logits, labels):
    """{"top1", "top5", "nll", "ece", "n"}: percentages in percent, NLL in nats.

    top5: within the first min(5, C). ece: expected calibration error, over `calibration`'s 15 bins.
    logits: (N, C); labels: (N,).
    """
    top = logits.topk(min(5, logits.shape[1])).indices              # (N, <=5)
    right = top == labels[:, None]
    _, confidence, hits = calibration(logits, labels)
    return {
        "top1": 100 * right[:, 0].double().mean().item(),
        "top5": 100 * right.any(1).double().mean().item(),
        "nll": F.cross_entropy(logits, labels).item(),
        "ece": 100 * (confidence - hits).abs().sum().item() / len(labels),
        "n": len(labels),
    }


def inheritance(student_logits, teacher_logits, labels):
    """How the student stands to the teacher's errors, in percent of what each key says."""
    student, teacher = student_logits.argmax(1), teacher_logits.argmax(1)
    wrong = teacher != labels
    return {
        "teacher_top1": 100 * (~wrong).double().mean().item(),
        "agreement": 100 * (student == teacher).double().mean().item(),
        "teacher_errors": int(wrong.sum()),
        "teacher_errors_made": int((wrong & (student == teacher)).sum()),
        "teacher_errors_avoided": int((wrong & (student == labels)).sum()),
    }


# --- The results table ----------------------------------------------------------------------------

def top1_of(config):
    """The metric of a run: "test_top1" or "val_top1"."""
    return config["evaluate"] + "_top1"


def read_run(folder):
    """(config, list of epoch rows) of a run folder. Raises UserError where one is damaged."""
    try:
        config = json.loads((folder / "config.json").read_text())
        config["evaluate"] = config.get("evaluate") or "test"
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        words = [config.get(k) for k in ("dataset", "student", "teacher", "schedule", "evaluate")]
        counts = [config.get(k) for k in ("epochs", "gamma", "seed", "image_size")]
        numbers = [value for row in rows for value in (row["epoch"], *row.values())]
        for values, kinds in ((words, (str, type(None))), (counts, (int, type(None))),
                              (numbers, (int, float))):
            if not all(isinstance(value, kinds) for value in values):
                raise ValueError("a value of the wrong type")
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: needs a readable config.json and metrics.jsonl ({error})")
    numbers = [row.get(top1_of(config)) for row in rows]
    if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in numbers or [None]):
        raise UserError(f"{folder / 'metrics.jsonl'}: empty, or not written by train.py")
    return config, rows


# Settings that may change when a run is resumed, since they fix no number.
FREE = ("data_dir", "device", "teacher_checkpoint", "cuda_graph")
# What may differ within a row of a table.
PER_SEED = {"seed", "amp", *FREE}
# What every run in a table must share; ce has no teacher.
ALIKE = ("dataset", "evaluate", "image_size", "student", "teacher", "epochs")


def read_rows(folder):
    """{row: {seed: (config, epochs)}} of the runs folder/<row>/<seed folder>, rows in alphabetical
    order, numbers in their names by size. Raises UserError where a row would mix experiments, or
    the rows differ in length, data, student or teacher."""
    def in_order(path):
        words = re.split(r"(\d+(?:\.\d+)?)", str(path))
        return [float(word) if k % 2 else word for k, word in enumerate(words)]

    rows, alike = {}, {}
    for path in sorted(Path(folder).rglob("metrics.jsonl"), key=in_order):
        run = path.parent
        if run == Path(folder):
            raise UserError(f"--table {folder}: is a run; give the folder that its row is in")
        config, epochs = read_run(run)
        row = rows.setdefault(str(run.parent.relative_to(folder)), {})
        if len(epochs) != config.get("epochs", len(epochs)):
            raise UserError(f"--table: {run} has {len(epochs)} of {config['epochs']} epochs; go on "
                            "with it, or take it out")
        try:
            env = json.loads((run / "env.json").read_text("utf-8"))
            images = env.get("data") and tuple(env["data"])
        except (OSError, ValueError, AttributeError, TypeError):
            env, images = {}, None
        about = {k: config.get(k) for k in ALIKE} | {
            "epochs": len(epochs),
            "teacher's digest": env.get("teacher_digest"), "images": images}
        for key, value in about.items():
            if value is not None:
                alike.setdefault(key, {}).setdefault(value, []).append(str(run))
        if config.get("seed") in row:
            raise UserError(f"--table: {run} is a second run of seed {config['seed']}; keep one")
        for other, _ in row.values():
            if any(config.get(k) != other.get(k) for k in {*config, *other} - PER_SEED):
                raise UserError(f"--table: {run.parent} mixes runs of different settings; keep the "
                                "seeds of one experiment in a folder")
        row[config.get("seed")] = config, epochs
    if not rows:
        raise UserError(f"--table {folder}: no metrics.jsonl below it; train.py writes them")
    for key, having in alike.items():
        _, *odd = sorted(having, key=lambda value: -len(having[value]))
        if odd:
            paths = ", ".join(f"{path} ({value})" for value in odd for path in having[value])
            raise UserError(f"--table {folder}: mixes runs of different {key}; the odd ones: "
                            f"{paths}")
    return rows


def last_top1(row):
    """{seed: top-1 of the last epoch} of a row of `read_rows`."""
    return {seed: epochs[-1][top1_of(config)] for seed, (config, epochs) in row.items()}


def p_value(t, df):
    """Two-sided, of Student's t (Abramowitz and Stegun, 26.7.3 and 26.7.4). df: a whole number."""
    angle, odd = math.atan(abs(t) / df ** 0.5), df % 2
    term, inside = math.cos(angle) ** odd, 0
    for k in range(odd, df - 1, 2):
        inside += term
        term *= (k + 1) / (k + 2) * math.cos(angle) ** 2
    inside *= math.sin(angle)
    return 1 - (2 / math.pi * (angle + inside) if odd else inside)


def quantile(p, df):
    """The t with that `p_value`, by bisection."""
    low, high = 0, 1e9
    for _ in range(100):
        t = (low + high) / 2
        low, high = (t, high) if p_value(t, df) > p else (low, t)
    return t


def interval(numbers):
    """(mean, low, high, p) of a list: the 95 % interval of Student's t, and p that the true mean is
    0. The last three are None for fewer than two numbers, mean too for none."""
    d = torch.tensor(numbers, dtype=torch.float64)
    mean, df = (d.mean().item() if len(d) else None), len(d) - 1
    if df < 1:
        return mean, None, None, None
    error = d.std().item() / len(d) ** 0.5
    half = quantile(0.05, df) * error
    t = mean / error if error else mean and math.inf
    return mean, mean - half, mean + half, p_value(t, df)


def difference(row, other):
    """The `interval` of last-epoch top-1 of `row` minus that of `other`, seed by seed: a seed fixes
    initial weights, order and views."""
    a, b = last_top1(row), last_top1(other)
    return interval([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())])


def holm(p):
    """{name: p}, each corrected for their number (Holm, 1979). What is None is left out."""
    p = {name: value for name, value in p.items() if value is not None}
    worst, corrected = 0, {}
    for k, name in enumerate(sorted(p, key=p.get)):
        corrected[name] = worst = max(worst, min(1, (len(p) - k) * p[name]))
    return corrected


def table(folder, against=None):
    """Markdown table of the runs below `folder`, each row compared with the one above, or with
    the row `against`, the verdict then with Holm's p. Raises UserError where `read_rows` does, or
    for an unknown row."""
    rows = read_rows(folder)
    if against is not None and against not in rows:
        raise UserError(f"--against {against}: no such row in {folder}; choose among "
                        f"{', '.join(rows)}")
    config, _ = next(iter(next(iter(rows.values())).values()))
    part, key = config["evaluate"], top1_of(config)
    lines = [f"| run | student | epochs | n seeds | last epoch, {part} top-1 % (mean ± sd) | "
             f"best epoch (mean; selected on {part}) | difference to {against or 'the row above'} "
             f"(95 % interval) | verdict{' (Holm)' if against else ''} |", "|---" * 8 + "|"]
    above, least, others = None, [], rows.keys() - {against}
    p = holm({name: difference(rows[name], rows[against])[3] for name in others if against})
    for name, row in rows.items():
        config, epochs = next(iter(row.values()))
        last = torch.tensor(list(last_top1(row).values()), dtype=torch.float64)
        best = [max(epoch[key] for epoch in epochs) for _, epochs in row.values()]
        spread = f" ± {last.std():.2f}" if len(row) > 1 else ""
        cells = [name, config["student"], str(len(epochs)), str(len(row)),
                 f"{last.mean():.2f}{spread}", f"{sum(best) / len(best):.2f}"]
        other = above if against is None else against if name != against else None
        mean, low, high, _ = difference(row, rows[other]) if other else [None] * 4
        if mean is None:
            cells += ["-", "-"]
        elif low is None:
            cells += [f"{mean:+.2f}", "one seed: not known"]
        else:
            shown = p[name] < 0.05 if against else low > 0 or high < 0
            verdict = ("better" if mean > 0 else "worse") if shown else "no difference shown"
            verdict += f" (p = {p[name]:.2g})" if against else ""
            df = len(row.keys() & rows[other].keys()) - 1
            least.append((high - mean) * quantile(0.05 / (len(p) or 1), df) / quantile(0.05, df))
            cells += [f"{mean:+.2f} ({low:+.2f} to {high:+.2f})", verdict]
        lines.append("| " + " | ".join(cells) + " |")
        above = name
    if p:
        # That of Holm's first step, the strictest.
        lines += ["", "A difference that is smaller than this is not shown, in the median row: "
                  f"{sorted(least)[len(least) // 2]:.1f} points."]
    return "\n".join(lines)


# --- Curves ---------------------------------------------------------------------------------------

# Okabe and Ito's colours, distinct to colour-blind readers too.
BLUE, ORANGE, GREEN, BLACK = "#0072B2", "#E69F00", "#009E73", "#222222"


def plot(folders):
    """Figure of the runs in `folders`, drawn over each other: the loss by term, top-1, and the
    share of rows whose top class is not the label. Marked: gamma, after which the student swap
    joins, and the drops of the learning rate. Raises UserError where `read_run` does."""
    panels = {
        "weighted loss": {"loss_ce": GREEN, "loss_teacher": BLUE, "loss_student": ORANGE},
        "top-1, %": {"train_top1": BLACK, "val_top1": BLUE, "test_top1": BLUE},
        "rows swapped, %": {"swap_teacher_weak": BLUE, "swap_teacher_strong": BLACK,
                            "swap_student": ORANGE},
    }
    figure = Figure(figsize=(10, 3.4), dpi=120, layout="constrained")
    axes = figure.subplots(1, 3)
    styles = list(zip(map(Path, folders), itertools.cycle(("-", "--", ":", "-."))))
    for folder, style in styles:
        config, rows = read_run(folder)
        epoch = [row["epoch"] for row in rows]
        gamma, step = config.get("gamma"), config.get("schedule") == "step"
        rates = [row.get("lr", math.nan) for row in rows]
        drops = [e for e, a, b in zip(epoch[1:], rates, rates[1:]) if step and b < 0.5 * a]
        for ax, (title, colours) in zip(axes, panels.items()):
            for key in [key for key in colours if any(key in row for row in rows)]:
                values = [row.get(key, math.nan) for row in rows]
                ax.plot(epoch, values, style, marker="." if len(rows) < 30 else "",
                        color=colours[key], label=key)
            if gamma is not None and gamma < len(rows):
                ax.axvline(gamma + 0.5, color=ORANGE, lw=4, alpha=0.3, label="γ")
            for drop in drops:
                ax.axvline(drop - 0.5, color="grey", ls=":", lw=1, label="learning rate falls")
            ax.set(xlabel="epoch", title=title)
            ax.spines[["top", "right"]].set_visible(False)
            ax.xaxis.get_major_locator().set_params(integer=True)
            # A colour stands for the same in all runs.
            shown = {line.get_label(): line for line in ax.lines}
            ax.legend(shown.values(), shown.keys(), frameon=False, fontsize=7)
    axes[0].set_yscale("log")
    if len(styles) > 1:
        lines = [Line2D([], [], color="grey", ls=style) for _, style in styles]
        figure.legend(lines, [str(folder) for folder, _ in styles], loc="outside lower center",
                      frameon=False, fontsize=7)
    return figure


# --- The command line -----------------------------------------------------------------------------

def evaluate(args):
    """{metric: value} of the checkpoint, and of how it stands to a teacher, where one is given."""
    device = pick_device(args.device or "auto")
    # Read twice, since the file says which data it has to fit.
    _, checkpoint = load_model(args.checkpoint, args.model)
    dataset = args.dataset or checkpoint.get("dataset")
    if dataset is None:
        raise UserError(f"{args.checkpoint}: does not say which data it was trained on; give "
                        "--dataset and --data-dir")
    size = 224 if args.model in TORCHVISION and dataset in PHOTOGRAPHS else None
    data = load(dataset, args.data_dir or checkpoint.get("data_dir", "data"),
                args.image_size or checkpoint.get("image_size", size), train=False)
    images, labels = data.test

    def logits_of(path, name):
        return predict(load_model(path, name, data)[0].to(device), images, data.mean, data.std)
    logits = logits_of(args.checkpoint, args.model)
    report = measure(logits, labels)
    if args.teacher_checkpoint:
        report |= inheritance(logits, logits_of(args.teacher_checkpoint, args.teacher), labels)
    return report


def classify(args):
    """[{"file", "classes": [[name, probability], …]}]: the five likeliest classes of each image."""
    device = pick_device(args.device or "auto")
    model, checkpoint = load_model(args.checkpoint)
    if "mean" not in checkpoint:
        raise UserError(f"--predict: {args.checkpoint} does not say its classes; give a file of "
                        "train.py, or the name of a torchvision network")
    # ImageNet's folders have numbers for names.
    names = (torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"]
             if checkpoint["dataset"] == "imagenet" else checkpoint["classes"])
    size = checkpoint["image_size"]
    side = stored_side(size) if checkpoint["dataset"] in PHOTOGRAPHS else size
    images = torch.stack([torch.from_numpy(read_image(path, side)) for path in args.predict])
    logits = predict(model.to(device), centre(images, size), checkpoint["mean"], checkpoint["std"])
    values, top = logits.softmax(1).topk(min(5, len(names)))
    return [dict(file=path, classes=[[names[k], p] for k, p in zip(*row)])
            for path, *row in zip(args.predict, top.tolist(), values.tolist())]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"eval.py: {message}; see --help\n")
    add = parser.add_argument
    add("checkpoint", nargs="?", help="last.pt or best.pt of a run, a foreign state dict, or the "
        "name of a network of torchvision.models, as published")
    add("--model", metavar="NAME", help=f"architecture of a foreign checkpoint: "
        f"{', '.join(MODELS)}, or a classifier of torchvision.models")
    add("--dataset", choices=DATASETS)
    add("--data-dir", metavar="DIR")
    add("--image-size", type=int, metavar="PX", help="side of photographs for a foreign "
        "checkpoint; default 64, for torchvision's networks 224")
    add("--predict", nargs="+", metavar="IMAGE", help="the five likeliest classes of each image")
    add("--teacher-checkpoint", metavar="FILE", help="also compare with this teacher")
    add("--teacher", metavar="NAME", help="architecture of a foreign teacher")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), help="default auto")
    add("--json", action="store_true", help="print one JSON object")
    add("--table", metavar="DIR", help="print the results table of the runs DIR/<row>/<seed>")
    add("--against", metavar="ROW", help="compare each row with this one instead of the row above")
    add("--plot", nargs="+", metavar="RUN", help="draw runs over each other, into curves.png")
    args = parser.parse_args()
    try:
        modes = [mode for mode in ("table", "plot", "checkpoint") if getattr(args, mode)]
        if len(modes) != 1:
            raise UserError("give either a CHECKPOINT, also for --predict, or --table DIR, or "
                            "--plot RUN")
        mode = "predict" if args.predict else modes[0]
        used = {"table": "against", "plot": "", "predict": "checkpoint device json", "checkpoint":
                "model dataset data_dir image_size teacher_checkpoint teacher device json"}[mode]
        for name, value in vars(args).items():
            if value not in (None, False) and name not in (mode, *used.split()):
                raise UserError(f"--{name.replace('_', '-')}: has no effect with "
                                f"{'a ' if mode == 'checkpoint' else '--'}{mode}; leave it out")
        if args.teacher and not args.teacher_checkpoint:
            raise UserError("--teacher: names the network of --teacher-checkpoint; give both")
        if args.image_size is not None and not 1 <= args.image_size <= 10 ** 6:
            raise UserError(f"--image-size {args.image_size}: must be from 1 to a million")
        for given, name in (("--model", args.model), ("--teacher", args.teacher)):
            with as_user_error(f"{given} "):
                check_name(name or "resnet8")
        if args.table:
            print(table(args.table, args.against))
            return
        if args.plot:
            plot(args.plot).savefig("curves.png")
            print("drawn: curves.png")
            return
        # What is said on the way does not belong into JSON.
        with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
            report = classify(args) if args.predict else evaluate(args)
    except UserError as error:
        parser.exit(2, f"eval.py: {error}\n")
    except OSError as error:
        parser.exit(2, f"eval.py: {error.filename or 'the output'}: {error.strerror or error}\n")
    if args.json:
        print(json.dumps(report))
    elif args.predict:
        for image in report:
            print(image["file"])
            for name, probability in image["classes"]:
                print(f"{100 * probability:10.2f} %  {name}")
    else:
        for key, value in report.items():
            form = "10.4f" if isinstance(value, float) else "10d"
            print(f"{key:24s}{value:{form}}")


if __name__ == "__main__":
    main()
