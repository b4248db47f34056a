"""What a run prints: the experiment in words, a line an epoch, and one line for an error."""
import contextlib
import os
import sys
import time

import torch

from support.distributed import process
from support.errors import UserError

COLUMNS = (  # heading, key, width, format
    ("epoch", "epoch", 5, "d"), ("lr", "lr", 8, ".2g"), ("ce", "loss_ce", 7, ".3f"),
    ("teacher", "loss_teacher", 8, ".3f"), ("student", "loss_student", 8, ".3f"),
    ("train%", "train_top1", 7, ".2f"), ("{part}%", "{part}_top1", 6, ".2f"),
    ("best%", "best_top1", 6, ".2f"), ("swapTw%", "swap_teacher_weak", 8, ".2f"),
    ("swapTs%", "swap_teacher_strong", 8, ".2f"), ("swapS%", "swap_student", 7, ".2f"),
    ("sec", "seconds", 7, ".1f"), ("img/s", "images_per_second", 7, ".0f"))
PARTS = dict(test="test", val="validation")


def columns(s):
    """Those of COLUMNS that a run with the settings s can have."""
    absent = set()
    if s.teacher is None:
        absent |= {"loss_teacher", "swap_teacher_weak", "swap_teacher_strong", "swap_student"}
    if s.views == "weak":
        absent.add("swap_teacher_strong")
    if not s.student_swap:
        absent.add("loss_student")
    return [column for column in COLUMNS if column[1] not in absent]


def legend(s):
    """What stands in the columns, and their headings."""
    lines = ["columns   ce: the weighted cross-entropy with the label",
             f"train%, {s.evaluate}%: top-1 on the weak training views and on the "
             f"{PARTS[s.evaluate]} part; best%: the best so far"]
    if s.student_swap:
        lines.insert(1, "student: the weighted KL against the pseudo-teacher")
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


def introduce(s, data, learner, folder, drops):
    """Print what is about to be trained, on what, and what the lines of the epochs mean."""
    half = str(learner.autocast.fast_dtype).removeprefix("torch.")
    precision = f"mixed precision ({half})" if s.amp else "float32"
    world = process()[1]
    device = next(learner.student.parameters()).device
    print(f"data      {s.dataset}: {len(data.train[1])} training and {len(data.test[1])} "
          f"{PARTS[s.evaluate]} images, {len(data.classes)} classes, {s.image_size} px\n"
          f"{in_words(s, drops)}\n"
          f"device    {device.type}{f' in {world} processes' if world > 1 else ''}, {precision}; "
          f"run folder {folder}\n{legend(s)}")


def not_finite(s, what):
    """The UserError to raise where `what` is not finite, with what may help."""
    return UserError(f"{what} not finite; try a smaller --lr{' or --no-amp' if s.amp else ''}")


@contextlib.contextmanager
def one_line_errors(parser, place="the run folder"):
    """Whatever a user can mend ends the program with one line and status 2; Ctrl-C with 130.
    place: what to blame for an OSError that names no file."""
    rank = int(os.environ.get("RANK", 0))
    try:
        yield
    except UserError as error:
        if rank:
            # Most errors occur on every process: let the first one print, before torchrun ends it.
            time.sleep(3)
        parser.exit(2, f"{parser.prog}: {error}\n")
    except OSError as error:
        # A full disk, a folder without permission.
        parser.exit(2, f"{parser.prog}: {error.filename or place}: {error.strerror or error}\n")
    except torch.OutOfMemoryError as error:
        # In training it is a UserError already. Here the images or the networks do not fit.
        parser.exit(2, f"{parser.prog}: --device: the GPU's memory is full; end what else uses it, "
                       f"or give --device cpu ({str(error).splitlines()[0]})\n")
    except KeyboardInterrupt as stop:
        if rank:
            sys.exit(130)
        parser.exit(130, f"\n{parser.prog}: interrupted; {stop or 'nothing was saved yet'}\n")


def in_words(s, drops):
    """The resolved experiment, a line for each of its parts. drops: the epochs after which the
    learning rate falls."""
    loss = "CE(label)" if s.method == "ce" else f"losses.{s.method}"
    if s.method in ("dkd", "rld"):
        parts = dict(dkd=("label against the rest", "the other classes"),
                     rld=("teacher's certainty", "the classes below the label"))[s.method]
        loss = (f"{s.ce_weight:g} CE(label) + {s.alpha:g} T^2 KL({parts[0]}) + {s.beta:g} T^2 "
                f"KL({parts[1]}) at T = {s.temperature:g}, in full after {s.kd_warmup:g} epochs")
    elif s.method in ("kd", "sld"):
        fixed = {"swap": "swapped teacher", "add": f"teacher + {s.omega} on the label"}
        loss = (f"{s.ce_weight:g} CE(label) + {s.kd_weight:g} T^2 "
                f"KL({fixed.get(s.teacher_fix, 'teacher')} || student) "
                f"at T = {', '.join(f'{T:g}' for T in s.temperatures)}")
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
            f"on        {views} of {s.dataset}, {'student ' if s.teacher else ''}{s.student}\n"
            f"with      {s.optimizer}, lr {s.lr:g} {rate}{warmup}, weight decay "
            f"{s.weight_decay:g}, {s.epochs} epochs, batch {s.batch_size}, seed {s.seed}")
