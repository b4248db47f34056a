"""Measure a classifier:  python eval.py CHECKPOINT;  make a table:  python eval.py --table DIR

A checkpoint of train.py needs no other flag. A foreign one needs --model, --dataset and --data-dir.
Everything is measured in float32 on the test part, so the numbers are those of a CPU run's log.
"""
import argparse
import itertools
import json
import math
import pickle
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from data import DATASETS, UserError, load, normalize
from models import MODELS, create_model


def load_model(path, name=None, data=None):
    """(network in eval mode, checkpoint dict) from a file of train.py, or a foreign state dict:
    bare, or under "model" or "state_dict", with or without "module." before each name.

    name: the architecture; needed for a foreign file. data: a Dataset that the network has to fit:
    its classes, and for a ViT its image size. Only tensors and plain types are unpickled. Raises
    UserError for a file that is missing, damaged, no checkpoint, or of another network or data.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        # The warning is of another pickle protocol: the file loads, or is refused below.
        with warnings.catch_warnings(action="ignore"):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: not a PyTorch checkpoint of tensors and plain types; it was not "
                        "loaded")
    except Exception:
        # A damaged file can raise nearly anything.
        raise UserError(f"{path}: not a PyTorch checkpoint, or damaged (empty, cut off, or another "
                        "file type)")
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
    head = state.get("fc.weight", state.get("head.weight"))
    if not isinstance(head, torch.Tensor) or head.ndim != 2:
        raise UserError(f"{path}: no classifier weights (fc.weight or head.weight), so not a "
                        f"{name} of this project")
    if len(head) < 2:
        raise UserError(f"{path}: has a single class; a classifier needs at least 2")
    try:
        model = create_model(name, len(head), checkpoint.get("image_size", 32))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: {error}")
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
        made_for, side = checkpoint.get("image_size", 32), data.test[0].shape[-1]
        if len(head) != len(data.classes):
            raise UserError(f"{path}: has {len(head)} classes, the data has {len(data.classes)}")
        if checkpoint.get("classes", data.classes) != data.classes:
            raise UserError(f"{path}: was trained on other classes than the data's "
                            f"{data.classes[:3]}…")
        if hasattr(model, "pos_embed") and side != made_for:
            raise UserError(f"{path}: a ViT for {made_for} px, the images have {side}; give "
                            "another checkpoint or --image-size")
    return model.eval(), checkpoint


@torch.inference_mode()
def predict(model, images, mean, std, batch_size=250):
    """Logits (N, C), float32, of uint8 images (N, 3, S, S). Leaves the network in eval mode."""
    model.eval()
    device = next(model.parameters()).device
    parts = (normalize(part.to(device), mean, std) for part in images.split(batch_size))
    logits = [model(x.contiguous(memory_format=torch.channels_last)).float() for x in parts]
    return torch.cat(logits).to(images.device)


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

def part_of(config):
    """What a run was measured on: "test" or "val"; old runs, which had no choice, do not say it."""
    return config.get("evaluate") or "test"


def top1_of(config):
    """The metric of a run: "test_top1" or "val_top1"."""
    return part_of(config) + "_top1"


def read_run(folder):
    """(config, list of epoch rows) of a run folder. Raises UserError where one is damaged."""
    try:
        config = json.loads((folder / "config.json").read_text())
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: needs a readable config.json and metrics.jsonl ({error})")
    numbers = [row.get(top1_of(config)) if isinstance(row, dict) else None for row in rows]
    if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in numbers or [None]):
        raise UserError(f"{folder / 'metrics.jsonl'}: empty, or not written by train.py")
    return config, rows


# Settings that may change when a run is resumed, since they fix no number.
FREE = ("data_dir", "device", "teacher_checkpoint")
# Settings that older runs have in their config.json.
GONE = ("run_dir", "resume", "compile")
# What may differ within a row of a table.
PER_SEED = {"seed", "amp", *FREE, *GONE}
# What every run in a table must share; ce has no teacher.
ALIKE = ("dataset", "image_size", "student", "teacher", "epochs")
# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom; the last serves beyond.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
         2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
         2.052, 2.048, 2.045, 2.042)


def read_rows(folder):
    """{row: {seed: (config, epochs)}} of the runs folder/<row>/<seed folder>, rows in alphabetical
    order. Raises UserError where a row would mix experiments, or the rows differ in length, data,
    student or teacher."""
    rows, alike = {}, {}
    for path in sorted(Path(folder).rglob("metrics.jsonl")):
        run = path.parent
        config, epochs = read_run(run)
        row = rows.setdefault(str(run.parent.relative_to(folder)), {})
        if len(epochs) != config.get("epochs", len(epochs)):
            raise UserError(f"--table: {run} has {len(epochs)} of {config['epochs']} epochs; go on "
                            "with it, or take it out")
        env = json.loads((run / "env.json").read_text()) if (run / "env.json").exists() else {}
        about = {k: config.get(k) for k in ALIKE} | {
            "evaluate": part_of(config), "epochs": len(epochs),
            "teacher's digest": env.get("teacher_digest")}
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


def interval(numbers):
    """(mean, low, high) of a list, with the 95 % interval of Student's t. low and high are None for
    fewer than two numbers, mean too for none."""
    d = torch.tensor(numbers, dtype=torch.float64)
    if len(d) < 2:
        return (d.mean().item() if len(d) else None), None, None
    half = T_975[min(len(d) - 1, len(T_975)) - 1] * d.std().item() / len(d) ** 0.5
    return d.mean().item(), d.mean().item() - half, d.mean().item() + half


def difference(row, other):
    """The `interval` of last-epoch top-1 of `row` minus that of `other`, seed by seed: a seed fixes
    initial weights, order and views."""
    a, b = last_top1(row), last_top1(other)
    return interval([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())])


def table(folder, against=None):
    """Markdown table of the runs below `folder`, each row compared with the one above, or with
    the row `against`. Raises UserError where `read_rows` does, or for an unknown row."""
    rows = read_rows(folder)
    if against is not None and against not in rows:
        raise UserError(f"--against {against}: no such row in {folder}; choose among "
                        f"{', '.join(rows)}")
    config, _ = next(iter(next(iter(rows.values())).values()))
    part, key = part_of(config), top1_of(config)
    lines = [f"| run | student | epochs | n seeds | last epoch, {part} top-1 % (mean ± sd) | "
             f"best epoch (mean; selected on {part}) | difference to {against or 'the row above'} "
             "(95 % interval) | verdict |", "|---" * 8 + "|"]
    above = None
    for name, row in rows.items():
        config, epochs = next(iter(row.values()))
        last = torch.tensor(list(last_top1(row).values()), dtype=torch.float64)
        best = [max(epoch[key] for epoch in epochs) for _, epochs in row.values()]
        spread = f" ± {last.std():.2f}" if len(row) > 1 else ""
        cells = [name, config["student"], str(len(epochs)), str(len(row)),
                 f"{last.mean():.2f}{spread}", f"{sum(best) / len(best):.2f}"]
        other = above if against is None else against if name != against else None
        mean, low, high = difference(row, rows[other]) if other else (None, None, None)
        if mean is None:
            cells += ["-", "-"]
        elif low is None:
            cells += [f"{mean:+.2f}", "one seed: not known"]
        else:
            verdict = "better" if low > 0 else "worse" if high < 0 else "no difference shown"
            cells += [f"{mean:+.2f} ({low:+.2f} to {high:+.2f})", verdict]
        lines.append("| " + " | ".join(cells) + " |")
        above = name
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
        drops = [b["epoch"] for a, b in zip(rows, rows[1:]) if step and b["lr"] < 0.5 * a["lr"]]
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
    # Read twice, since the file says which data it has to fit.
    _, checkpoint = load_model(args.checkpoint, args.model)
    dataset = args.dataset or checkpoint.get("dataset")
    if dataset is None:
        raise UserError(f"{args.checkpoint}: does not say which data it was trained on; give "
                        "--dataset and --data-dir")
    statistics = (checkpoint["mean"], checkpoint["std"]) if "mean" in checkpoint else None
    data = load(dataset, args.data_dir or checkpoint.get("data_dir", "data"),
                checkpoint.get("image_size"), train=False, statistics=statistics)
    images, labels = data.test
    model, _ = load_model(args.checkpoint, args.model, data)
    logits = predict(model, images, data.mean, data.std)
    report = measure(logits, labels)
    if args.teacher_checkpoint:
        teacher, _ = load_model(args.teacher_checkpoint, args.teacher, data)
        report |= inheritance(logits, predict(teacher, images, data.mean, data.std), labels)
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"eval.py: {message}; see --help\n")
    add = parser.add_argument
    add("checkpoint", nargs="?", help="last.pt or best.pt of a run, or a foreign state dict")
    add("--model", choices=MODELS, metavar="NAME",
        help=f"architecture of a foreign checkpoint: {', '.join(MODELS)}")
    add("--dataset", choices=DATASETS)
    add("--data-dir", metavar="DIR")
    add("--teacher-checkpoint", metavar="FILE", help="also compare with this teacher")
    add("--teacher", choices=MODELS, metavar="NAME", help="architecture of a foreign teacher")
    add("--json", action="store_true", help="print one JSON object")
    add("--table", metavar="DIR", help="print the results table of the runs DIR/<row>/<seed>")
    add("--against", metavar="ROW", help="compare each row with this one instead of the row above")
    add("--plot", nargs="+", metavar="RUN", help="draw runs over each other, into curves.png")
    args = parser.parse_args()
    try:
        if sum(map(bool, (args.table, args.checkpoint, args.plot))) != 1:
            raise UserError("give either a CHECKPOINT, or --table DIR, or --plot RUN")
        if args.teacher and not args.teacher_checkpoint:
            raise UserError("--teacher: names the network of --teacher-checkpoint; give both")
        if args.against and not args.table:
            raise UserError("--against: names a row of --table; give both")
        if args.table:
            print(table(args.table, args.against))
            return
        if args.plot:
            plot(args.plot).savefig("curves.png")
            print("drawn: curves.png")
            return
        report = evaluate(args)
    except UserError as error:
        parser.exit(2, f"eval.py: {error}\n")
    if args.json:
        print(json.dumps(report))
        return
    for key, value in report.items():
        print(f"{key:24s}{value:10.4f}" if isinstance(value, float) else f"{key:24s}{value:10d}")


if __name__ == "__main__":
    main()
