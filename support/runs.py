"""The folder of a run: its name, its lock, its files, and what is said when a run ends early.

Holds config.json (the settings), env.json (where it was made), metrics.jsonl (a line an epoch),
curves.png, best.pt and last.pt, with which a run goes on. Each file is whole at any moment.
"""
import contextlib
import dataclasses
import io
import itertools
import json
import re
import shlex
from pathlib import Path

import filelock
import torch

from support.checkpoints import load_model
from support.console import data_name
from support.devices import environment, memory_is_full
from support.distributed import by_the_first, process
from support.errors import UserError
from support.files import atomic_write, locked
from support.plots import plot
from support.settings import flag
from support.tables import MAY_CHANGE_ON_RESUME, TOUCH_NO_NUMBER, settings_of

# The temporary files of a process that was killed while it wrote.
LEFT_OVER = re.compile(r"(config|env|metrics|curves|best|last)\.(jsonl?|png|pt)\.\d+\.tmp")


# --- Folders --------------------------------------------------------------------------------------

def is_empty(folder):
    return all(path.name == "lock" or LEFT_OVER.fullmatch(path.name) for path in folder.iterdir())


def read_config(folder):
    """The settings in a run folder's config.json; none where that is no such file."""
    try:
        return dict(json.loads((folder / "config.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


@contextlib.contextmanager
def opened(s, run_dir, resume):
    """Context: the folder of a run with the settings s, which no other process trains in meanwhile.

    run_dir: the folder, or None for runs/<data>-<method>-<student>/seed<seed>; where that row holds
    runs of other settings, or this seed, the row is numbered -2, -3, … So the seeds of one
    experiment lie beside each other, and two runs that start at once do not meet. Raises UserError
    where a new run_dir holds something, another process trains there, or it cannot be written.
    """
    with contextlib.ExitStack() as lock:
        yield by_the_first(lambda: take(Path(run_dir), lock, resume) if run_dir is not None
                           else free_folder(s, lock))
        # The first process may still be writing what the others read next.
        by_the_first(lambda: None)


class Taken(UserError):
    """A folder in which there is a run already, or another process trains."""


def take(folder, lock, resume=False):
    """`folder`, made where it is missing, and locked as long as the ExitStack `lock` is open.
    Raises Taken, or UserError where nothing can be written there."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        lock.enter_context(locked(folder / "lock"))
    except filelock.Timeout:
        raise Taken(f"{folder}: another process is training there; wait until it is done, or give "
                    "another --run-dir")
    except OSError as error:
        raise UserError(f"--run-dir {folder}: cannot be made ({error.strerror}); give another")
    if not resume and not is_empty(folder):
        raise Taken(f"--run-dir {folder}: already holds a run or other files; give another, or "
                    "--resume to go on")

    def tidy():
        """Where nothing was trained, leave no folder that was made here."""
        with contextlib.suppress(OSError):
            if is_empty(folder):
                (folder / "lock").unlink()
                for path in missing:
                    path.rmdir()
    lock.callback(tidy)
    return folder


def free_folder(s, lock):
    """The first folder for a run with the settings s that is not taken."""
    name = f"runs/{data_name(s)}-{s.method}-{s.student}"
    ours = settings_of(json.loads(json.dumps(vars(s))))
    for k in itertools.count(1):
        folder = Path(name if k == 1 else f"{name}-{k}") / f"seed{s.seed}"
        if not (folder / "config.json").exists() and all(
                settings_of(read_config(path.parent)) == ours
                for path in folder.parent.glob("*/config.json")):
            with contextlib.suppress(Taken):
                return take(folder, lock)


def teacher_folder(s, data, mine):
    """Where the teacher that is trained for the settings s, by its own settings `mine`, is kept.
    The name says the images, whether a validation part was held out, pretraining with its batch
    size, and the epochs."""
    name = data_name(s) if data.area is None else f"{data_name(s)}-{s.image_size}px"
    if data.digests:
        # Two folders may share a name: their images tell them apart.
        name += f"-{data.digests[0]}"
    if data.held_out:
        name += "-val"
    if mine["pretrained"]:
        name += f"-pretrained-batch-{mine['batch_size']}"
    return Path(f"runs/teacher-{name}-{mine['epochs']}-epochs-{s.teacher}")


def reopen(given, run_dir, resolve):
    """(resolved settings, checkpoint or None) of a run that goes on.

    given: {name: value} of the flags beside --resume. resolve: f(settings as a dict) -> resolved
    ones. Raises UserError where there is no run, or a flag would change it.
    """
    if run_dir is None:
        raise UserError("--resume: say which run with --run-dir")
    folder = Path(run_dir)
    names = ", ".join(flag(k) for k in given if k not in MAY_CHANGE_ON_RESUME)
    if names:
        raise UserError(f"--resume: {folder} goes on with its own settings; leave out {names}")
    config, seeds = read_config(folder), sorted(folder.glob("seed*/config.json"))
    if seeds and not config:
        raise UserError(f"--resume: {folder} is no run; for a run in it give {seeds[0].parent}")
    try:
        if not config:
            raise ValueError("config.json is missing or damaged")
        s = resolve(config)
    except (ValueError, TypeError) as error:
        raise UserError(f"--resume: {folder} holds no run to go on with ({error}); start anew with "
                        "another --run-dir, or remove this one")
    last, checkpoint = folder / "last.pt", None
    if last.exists():
        checkpoint = load_model(last)[1]
        theirs = checkpoint.get("settings")
        if not theirs or any(theirs.get(name, value) != value for name, value in vars(s).items()
                             if name not in TOUCH_NO_NUMBER):
            raise UserError(f"--resume: {last} is not a checkpoint of this run; put the run's own "
                            "back")
    elif (folder / "metrics.jsonl").exists():
        raise UserError(f"--resume: {last} is gone, so nothing can go on; put it back, or start "
                        "anew with another --run-dir")
    return dataclasses.replace(s, **given), checkpoint


def saved_device(run_dir):
    """The device that the config.json of a run to be resumed says; None where there is none."""
    return read_config(Path(run_dir)).get("device") if run_dir else None


# --- Files ----------------------------------------------------------------------------------------

def write(path, content):
    with atomic_write(path) as file:
        file.write(content)


def write_json(path, value):
    write(path, (json.dumps(value, indent=1) + "\n").encode())


def as_row(epoch, lr, sums, n, seconds, skipped=0, scaler=None):
    """The line of metrics.jsonl of an epoch. sums: {name: sum over its n rows} of what
    train.take_step returns. skipped: the steps that the GradScaler left out. Raises UserError where
    it would leave out any."""
    # It halves its scale each time. So small a scale makes no gradient of float16 overflow.
    if skipped and scaler.get_scale() < 2 ** -24:
        raise UserError(f"epoch {epoch}: {skipped} steps were skipped, since the gradients are not "
                        "finite; try --no-amp or a smaller --lr")
    means = {name: value / n for name, value in sums.items() if name != "loss"}
    # The student's misclassified rows on the weak view and, where there is one, on the strong.
    wrong = [means.pop(k) for k in ("swap_student_weak", "swap_student_strong") if k in means]
    loss_terms = {name: value for name, value in means.items() if name.startswith("loss_")}
    swaps = {name: 100 * value for name, value in means.items() if name.startswith("swap_")}
    return dict(epoch=epoch, lr=lr, loss=sum(loss_terms.values()), **loss_terms, **swaps,
                train_top1=100 * (1 - wrong[0]), swap_student=100 * sum(wrong) / len(wrong),
                skipped_steps=skipped, seconds=seconds, images_per_second=n / seconds)


def write_metrics(folder, history):
    write(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in history).encode())


def write_curves(folder):
    curves = io.BytesIO()
    plot([folder]).savefig(curves)
    write(folder / "curves.png", curves.getvalue())


def start(folder, s, data, learner):
    """Write config.json and env.json where they are missing, and remove what a killed process left
    half written."""
    for path in folder.iterdir():
        if LEFT_OVER.fullmatch(path.name):
            path.unlink()
    if not (folder / "config.json").exists():
        # First, since with it the run can be resumed.
        write_json(folder / "config.json", dataclasses.asdict(s))
    if not (folder / "env.json").exists():
        about = environment(next(learner.student.parameters()).device)
        write_json(folder / "env.json", about | dict(
            processes=process()[1], teacher_digest=learner.teacher_digest, data=data.digests))


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


def restore(saved, s, data, learner):
    """Put the student, the optimiser and the scaler back as the checkpoint `saved` has them, and
    return its history. Raises UserError where teacher or images are not those of the run."""
    if saved["teacher_digest"] != learner.teacher_digest:
        raise UserError("--resume: this teacher's weights differ from those that the run "
                        "began with; put the original file back")
    if saved["data"] != data.digests:
        raise UserError(f"--data-dir {s.data_dir}: not the images of this run (names or "
                        "pixels differ); put them back, or start anew")
    world = process()[1]
    if saved["processes"] != world:
        print(f"note      begun in {saved['processes']} processes, which give other numbers "
              f"than {world}")
    learner.student.load_state_dict(saved["model"])
    learner.optimizer.load_state_dict(saved["optimizer"])
    # Empty from a run without float16.
    if saved["scaler"]:
        learner.scaler.load_state_dict(saved["scaler"])
    return saved["history"]


# --- The end --------------------------------------------------------------------------------------

@contextlib.contextmanager
def report_failure(s, folder, history):
    """Whatever ends a run early becomes one line that says what is saved and how to go on."""
    world = process()[1]
    launch = f"torchrun --standalone --nproc-per-node {world}" if world > 1 else "python"
    command = f"{launch} train.py --resume --run-dir {shlex.quote(str(folder))}"

    def saved(how=""):
        there = (folder / "last.pt").exists()
        return f"epoch {len(history)} is saved{how}" if there else "no epoch is saved"
    go_on = f": {command} goes on after it"
    try:
        yield
    except BrokenPipeError:
        raise
    except UserError as error:
        raise UserError(f"{error}; {saved()}")
    except KeyboardInterrupt:
        raise KeyboardInterrupt(saved(go_on))
    except OSError as error:
        raise UserError(f"{folder}: cannot write epoch {len(history) + 1} "
                        f"({error.strerror or error}); {saved(go_on)}")
    except (MemoryError, RuntimeError) as error:
        if memory_is_full(error):
            raise UserError(f"--batch-size {s.batch_size}: the memory is full; try "
                            f"--batch-size {max(1, s.batch_size // 2)}")
        if world == 1:
            raise
        # gloo and nccl raise it once a process of this run is gone, but a device may too.
        reason = str(error).partition("\n")[0]
        raise UserError(f"{folder}: another process of this run is gone, or this one failed "
                        f"({reason}); {saved(go_on)}")
