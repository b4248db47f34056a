"""What a run prints: the experiment in words, a line an epoch, how far it is, and one line for an
error."""
import contextlib
import io
import math
import os
import shlex
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from support.devices import memory_is_full
from support.distributed import process
from support.errors import UserError
from support.report import comparison

COLUMNS = (  # heading, key, width, format
    ("epoch", "epoch", 5, "d"), ("lr", "lr", 8, ".2g"), ("ce", "loss_ce", 7, ".3f"),
    ("teacher", "loss_teacher", 8, ".3f"), ("student", "loss_student", 8, ".3f"),
    ("batch", "loss_batch", 8, ".3f"), ("class", "loss_class", 9, ".3f"),
    ("train%", "train_top1", 7, ".2f"), ("{part}%", "{part}_top1", 6, ".2f"),
    ("best%", "best_top1", 6, ".2f"), ("swapTw%", "swap_teacher_weak", 8, ".2f"),
    ("swapTs%", "swap_teacher_strong", 8, ".2f"), ("swapS%", "swap_student", 7, ".2f"),
    ("sec", "seconds", 7, ".1f"), ("img/s", "images_per_second", 7, ".0f"))
PARTS = dict(test="test", val="validation")


def columns(s):
    """Those of COLUMNS that a run with the settings s can have."""
    taught, mlkd = s.teacher is not None, s.method == "mlkd"
    shown = dict(loss_teacher=taught, loss_student=s.student_swap, loss_batch=mlkd, loss_class=mlkd,
                 swap_teacher_weak=taught, swap_teacher_strong=taught and s.views == "both",
                 swap_student=taught)
    return [column for column in COLUMNS if shown.get(column[1], True)]


def legend(s):
    """What stands in the columns, and their headings."""
    lines = ["columns   ce: the weighted cross-entropy with the label",
             f"train%, {s.evaluate}%: top-1 on the weak training views and on the "
             f"{PARTS[s.evaluate]} part; best%: the best so far"]
    if s.student_swap:
        lines.insert(1, "student: the weighted KL against the pseudo-teacher")
    if s.method == "mlkd":
        lines.insert(1, "batch, class: how far the student is from the teacher in what images are "
                        "alike, and\n          what classes; weighted")
    if s.teacher is not None:
        lines.insert(1, "teacher: the weighted KL against the teacher")
        lines.append("swap: training images whose top class is not the label: of the teacher on "
                     "weak (Tw) and\n          strong (Ts) views, of the student (S)")
    heads = " ".join(head.format(part=s.evaluate).rjust(width) for head, _, width, _ in columns(s))
    return "\n          ".join(lines) + f"\n\n{heads}"


def epoch_line(row, s):
    """One fixed-width line under the headings; a term that has not joined yet shows as a dash.
    Behind it, where float16 overflowed, how many steps were skipped."""
    cells = ((key.format(part=s.evaluate), width, form) for _, key, width, form in columns(s))
    line = " ".join((format(row[key], form) if key in row else "-").rjust(width)
                    for key, width, form in cells)
    skipped = row.get("skipped_steps")
    return line + (f"  {skipped} steps skipped" if skipped else "")


def data_name(s):
    """The data set's name, or that of the folder of photographs."""
    return Path(s.data_dir).resolve().name if s.dataset == "folder" else s.dataset


def more_steps(s, data):
    """How few steps the training images make, and flags for some 300, where they are less than
    200; otherwise "". After 30 steps a network was no better than guessing that 360 brought to
    96 %."""
    n = len(data.train[1])
    steps, batch = math.ceil(n / s.batch_size) * s.epochs, min(16, s.batch_size)
    if steps >= 200 or s.dataset != "folder":
        return ""
    return (f"only {steps} steps in all; if it learns little, try --batch-size {batch} --epochs "
            f"{max(s.epochs, math.ceil(300 / math.ceil(n / batch)))}")


def print_epoch(s, data, history):
    """Print the line of the last row of `history`, and once in a run that the student has learnt
    nothing: it is not shown to know more than the classes' shares, by its accuracy on the training
    and on the measured images, nor by its likelihood."""
    print(epoch_line(history[-1], s), flush=True)
    shares = [labels.bincount().cpu() / len(labels) for _, labels in (data.train, data.test)]
    # The largest class's share and three standard errors, in percent.
    bounds = [100 * (p.max() + 3 * (p.max() * (1 - p.max()) / len(labels)) ** 0.5)
              for p, (_, labels) in zip(shares, (data.train, data.test))]
    entropy = torch.special.entr(shares[1]).sum().item()
    steps = math.ceil(len(data.train[1]) / s.batch_size)

    def at_chance(row):
        # Some start slowly: in the warm-up, or with few steps.
        late = row["epoch"] > s.warmup and row["epoch"] * steps >= 50 or row["epoch"] == s.epochs
        return (late and row["train_top1"] <= bounds[0] and row[s.evaluate + "_top1"] <= bounds[1]
                and not row[s.evaluate + "_nll"] < 0.98 * entropy)
    *before, now = map(at_chance, history)
    if now and not any(before):
        top1, nll = (history[-1][f"{s.evaluate}_{key}"] for key in ("top1", "nll"))
        advice = more_steps(s, data) or f"try a tenth of --lr {s.lr:g}, or else a higher one"
        print(f"warning   hardly better than guessing: {top1:.2f} % {s.evaluate} top-1, NLL "
              f"{nll:.4g}; to know only how frequent each class is gives "
              f"{100 * shares[1].max():.2f} % and {entropy:.4g}; {advice}", flush=True)


def say_pretrained(s, C):
    """Print that the network of a run starts from published weights, with C classes. In a run
    without a teacher, which may train one for another run, it is not called the student."""
    head = f", with a new last layer for {C} classes" if C != 1000 else ""
    who = "student" if s.teacher else "network"
    print(f"{who:10s}{s.student} from torchvision's ImageNet weights{head}")


def introduce(s, data, learner, folder, drops, own):
    """Print what is about to be trained, on what, and what the lines of the epochs mean. drops,
    own: as for `in_words`."""
    half = str(learner.autocast.fast_dtype).removeprefix("torch.")
    precision = f"mixed precision ({half})" if s.amp else "float32"
    world = process()[1]
    device = next(learner.student.parameters()).device
    few = f"note      {advice}\n" if (advice := more_steps(s, data)) else ""
    print(f"data      {data_name(s)}: {len(data.train[1])} training and {len(data.test[1])} "
          f"{PARTS[s.evaluate]} images, {len(data.classes)} classes, {s.image_size} px\n"
          f"{few}{in_words(s, drops, own)}\n"
          f"device    {device.type}{f' in {world} processes' if world > 1 else ''}, {precision}; "
          f"run folder {folder}\n{legend(s)}")


def conclude(s, data, learner, folder, row):
    """Print what has come of a run: row is the last epoch's line of metrics.jsonl."""
    last, best = row[s.evaluate + "_top1"], row["best_top1"]
    print()
    if learner.costs:
        top1, teacher, student = learner.costs
        print(comparison(dict(name=s.teacher, top1=top1) | teacher,
                         dict(name=s.student, top1=last) | student, len(data.classes), s.evaluate,
                         next(learner.student.parameters()).device.type))
    print(f"last epoch {last:.2f} %, best {best:.2f} % (selected on {s.evaluate}); "
          f"python eval.py {shlex.quote(str(folder / 'last.pt'))}")


def not_finite(s, where, numbers=None):
    """The UserError to raise where the weights, or else the loss are not finite, with what may
    help. numbers: the loss and its terms, {name: number}."""
    what, way = "the loss is" if numbers else "the weights are", "try a smaller --lr"
    finite = {name: math.isfinite(number) for name, number in (numbers or {}).items()}
    if finite.get("loss_ce") and not finite.get("loss_teacher", True):
        # The cross-entropy, of the student's logits alone, would not be finite either.
        what, way = "the teacher's outputs are", "give another --teacher-checkpoint"
    return UserError(f"{where}: {what} not finite; {way}{' or --no-amp' if s.amp else ''}")


def progress(items, total, what, rounds=1):
    """The `total` items one by one, with tqdm's bar on a terminal, elsewhere with a line at most
    every 30 seconds. what: words before the number that are done. rounds: of how many passes
    like this one, which is the first, the line estimates the time."""
    if sys.stderr.isatty():
        yield from tqdm(items, what, total, leave=False, delay=1, disable=process()[0] > 0)
        return
    start = said = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - said >= 30:
            said, minutes = now, round((now - start) * (total * rounds / done - 1) / 60)
            left = f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
            print(f"{what} {done} of {total}, about {left} to go", flush=True)
        yield item


@contextlib.contextmanager
def one_line_errors(parser):
    """Whatever a user can mend ends the program with one line and status 2; Ctrl-C with 130, and
    with 141, quietly, once nobody reads the output any more. Names in any script can be printed:
    what the console's encoding lacks appears as \\u732b."""
    rank = int(os.environ.get("RANK", 0))
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Line by line, so that a file shows how far a run is.
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        try:
            yield
        finally:
            print(end="", flush=True)
    except BrokenPipeError:
        drop_output()
        sys.exit(141)
    except UserError as error:
        try:
            # Most errors occur on every process: let the first one print, before torchrun ends the
            # others.
            time.sleep(3 if rank else 0)
        except KeyboardInterrupt:
            sys.exit(130)
        parser.exit(2, f"{parser.prog}: {error}\n")
    except OSError as error:
        # A full disk, a folder without permission.
        drop_output()
        parser.exit(2, f"{parser.prog}: {UserError(error)}\n")
    except (MemoryError, RuntimeError) as error:
        if not memory_is_full(error):
            raise
        # In training it is a UserError already. Here the images or the networks do not fit.
        parser.exit(2, f"{parser.prog}: --device: its memory is full; end what else uses it, or "
                       f"give another ({''.join(str(error).splitlines()[:1])})\n")
    except KeyboardInterrupt as stop:
        if rank:
            sys.exit(130)
        parser.exit(130, f"\n{parser.prog}: interrupted; {stop or 'nothing was saved yet'}\n")


def drop_output():
    """Else Python complains, when it ends, of what a closed pipe or a full disk does not take."""
    with contextlib.suppress(AttributeError, OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def in_words(s, drops, own=""):
    """The resolved experiment, a line for each of its parts. drops: the epochs after which the
    learning rate falls. own: what to say of an objective that is not one of the six."""
    T = ", ".join(f"{T:g}" for T in s.temperatures or ())
    loss = "CE(label)" if s.method == "ce" else own
    if s.method in ("dkd", "rld"):
        parts = dict(dkd=("label against the rest", "the other classes"),
                     rld=("teacher's certainty", "the classes below the label"))[s.method]
        loss = (f"{s.ce_weight:g} CE(label) + {s.alpha:g} T^2 KL({parts[0]}) + {s.beta:g} T^2 "
                f"KL({parts[1]}) at T = {s.temperature:g}, in full after {s.kd_warmup:g} epochs")
    elif s.method in ("kd", "sld"):
        fixed = {"swap": "swapped teacher", "sort": "teacher with the label moved to rank 1",
                 "add": f"teacher + {s.omega} on the label",
                 "add-wrong": f"teacher + {s.omega} on the label where it is wrong"}
        right = ", of rows whose teacher is right" if s.teacher_fix == "mask" else ""
        loss = (f"{s.ce_weight:g} CE(label) + {s.kd_weight:g} T^2 "
                f"KL({fixed.get(s.teacher_fix, 'teacher')} || student) at T = {T}{right}")
    elif s.method == "mlkd":
        loss = (f"{s.ce_weight:g} CE(label) + {s.kd_weight:g} T^2 KL(teacher || student)\n"
                f"          + {s.kd_weight:g} ||P P' - Q Q'||^2 / images: which images are alike\n"
                f"          + {s.kd_weight:g} ||P' P - Q' Q||^2 / classes: which go together\n"
                f"          at T = {T}; P, Q: a batch's probabilities, teacher's and student's")
    if s.standardize:
        loss += "\n          of standardized logits"
    if s.student_swap:
        loss += (f"\n          + {s.kd_weight:g} T^2 KL(swapped student || student) from epoch "
                 f"{s.gamma + 1} on{', its gradient stopped' if s.detach else ''}")
    falls = [epoch for epoch in drops if epoch < s.epochs]
    after = f"x0.1 after epoch {', '.join(map(str, falls))}" if falls else "constant"
    rate = "cosine to 0" if s.schedule == "cosine" else after
    warmup = f", warm-up {s.warmup:g} epochs" if s.warmup else ""
    views = "weak and strong views" if s.views == "both" else "the weak view"
    return (f"minimise  {loss}\n"
            f"on        {views} of {data_name(s)}, {'student ' if s.teacher else ''}{s.student}\n"
            f"with      {s.optimizer}, lr {s.lr:g} {rate}{warmup}, weight decay "
            f"{s.weight_decay:g}, {s.epochs} epochs, batch {s.batch_size}, seed {s.seed}")
