"""Train several runs of one seed at once:  python results/together.py GROUP [--rows ROW …]

What is the same for all of them is computed once: the images, their order, the views and the
teacher's logits on them. On a GPU each student has a stream of its own, on which a step, from the
choice of its images to the optimiser, is one CUDA graph, so that the small kernels of one student
fill the gaps of another. Rows, settings, step, logs and checkpoints are those of results/run.py and
train.py, and either goes on with what the other has begun.
"""
import argparse
import contextlib
import math
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import train  # noqa: E402
from data import batches, load  # noqa: E402
from eval import measure, predict  # noqa: E402
from results.run import GROUPS  # noqa: E402
from support import console, runs  # noqa: E402
from support.checkpoints import is_finite  # noqa: E402
from support.devices import keep_on, pick_device  # noqa: E402
from support.errors import UserError  # noqa: E402
from support.settings import make_parser  # noqa: E402

# What the runs must have in common. The teacher may be missing.
SHARED = ("dataset", "data_dir", "image_size", "evaluate", "seed", "epochs", "batch_size", "amp")
# Epochs from one checkpoint to the next: writing them takes a good part of a short epoch.
SAVE_EVERY = 10


class Epoch:
    """The normalised views of one epoch, in order, and the teacher's logits on them."""

    def __init__(self, data, n_views, device):
        n, side = len(data.train[1]), data.test[0].shape[-1]
        # Channels last, so that a choice of rows has the layout that convolutions like.
        self.views = torch.empty(n_views, n, side, side, 3, device=device)
        self.logits = torch.empty(n_views, n, len(data.classes), device=device)
        self.target = torch.empty(n, dtype=torch.int64, device=device)

    def fill(self, seed, epoch, data, teacher, autocast):
        """A generator that fills this with the given epoch, piece by piece."""
        start, views = 0, ("weak", "both")[len(self.views) - 1]
        for made, target in batches(data, 2048, views, seed, epoch, device=self.target.device):
            rows = slice(start, start + len(target))
            self.target[rows] = target
            for view, pixels, logits in zip(made, self.views, self.logits):
                pixels[rows] = view.permute(0, 2, 3, 1)
                if teacher:
                    with torch.no_grad(), autocast:
                        logits[rows] = teacher(pixels[rows].permute(0, 3, 1, 2)).float()
            start = rows.stop
            yield

    def copy_(self, other):
        for own, new in zip(vars(self).values(), vars(other).values()):
            own.copy_(new)


class Run:
    """One of the runs, and its step. now: the Epoch from which it takes its images."""

    def __init__(self, s, folder, learner, history, now):
        self.s, self.folder, self.learner, self.history, self.now = s, folder, learner, history, now
        n, device = len(now.target), now.target.device
        self.steps = math.ceil(n / s.batch_size)
        self.stream = torch.cuda.Stream(priority=-1) if device.type == "cuda" else None
        self.graph, self.phase = None, None
        # What changes from step to step lies on the device, where a graph reads it anew each time.
        self.done = torch.zeros(1, dtype=torch.int64, device=device)
        self.first = torch.arange(s.batch_size, device=device)
        self.rates, self.lr = torch.zeros(self.steps, device=device), torch.zeros((), device=device)
        self.use_device_rate()
        if learner.teacher:
            learner.teacher = self.look_up

    def use_device_rate(self):
        optimizer = self.learner.optimizer
        for group in optimizer.param_groups:
            group.update(lr=self.lr, fused=self.stream is not None)
            if self.stream and "capturable" in group:
                group["capturable"] = True
        for state in optimizer.state.values():
            if "step" in state and self.stream:
                state["step"] = state["step"].to(self.lr.device)

    def look_up(self, images):
        """In place of the teacher: its logits on the views of this step, the weak ones first."""
        views = self.now.logits[:len(images) // len(self.rows)]
        return views.index_select(1, self.rows).flatten(0, 1)

    def begin_epoch(self):
        s, self.epoch = self.s, len(self.history) + 1
        self.rates.copy_(torch.tensor([
            train.learning_rate(s, self.epoch - 1 + (step + 0.5) / self.steps)
            for step in range(self.steps)]))
        self.done.zero_()
        # All that an objective makes of the epoch. Where it changes, another graph is needed.
        phase = (s.gamma is not None and self.epoch > s.gamma,
                 s.kd_warmup is not None and min(self.epoch, s.kd_warmup))
        if phase != self.phase:
            self.phase, self.graph, self.sums, self.plain = phase, None, None, 0
        else:
            self.sums.zero_()
        self.objective = train.make_objective(s)
        self.learner.student.train()

    def compute(self, rows):
        """A step on these rows (B,) of the epoch. Nothing in it waits for the device."""
        self.rows = rows
        views = [v.index_select(0, rows).permute(0, 3, 1, 2)                       # (B, 3, S, S)
                 for v in self.now.views[:1 + (self.s.views == "both")]]
        target = self.now.target.index_select(0, rows)                             # (B,)
        numbers = train.take_step(self.learner, self.objective, self.epoch, views, target,
                                  len(rows), 1.0)
        self.lr.copy_(self.rates.index_select(0, self.done)[0])
        self.learner.optimizer.step()
        self.done += 1
        self.names, numbers = list(numbers), torch.stack([*numbers.values()])
        self.sums = torch.zeros_like(numbers) if self.sums is None else self.sums
        self.sums += numbers

    def take_step(self, step):
        start, whole = step * self.s.batch_size, len(self.first)
        with torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
            if start + whole > len(self.now.target):
                self.compute(self.first[:len(self.now.target) - start] + start)
            elif self.graph:
                self.graph.replay()
            elif self.plain < 3 or not self.stream:
                # cuDNN makes its choices in these.
                self.plain += 1
                self.compute(self.first + start)
            else:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph, stream=self.stream):
                    self.compute(self.first + self.done * whole)
                # Recording computes nothing.
                self.graph.replay()

    def end_epoch(self, data, seconds, save):
        """Measure the student, add the epoch's row to the history, and print it."""
        s, learner, history = self.s, self.learner, self.history
        sums = dict(zip(self.names, self.sums.tolist()))
        where = f"{self.folder}: epoch {self.epoch}"
        if not math.isfinite(sums["loss"]):
            raise console.not_finite(s, where, sums)
        if not is_finite(learner.student):
            raise console.not_finite(s, where)
        lr, n = train.learning_rate(s, self.epoch - 0.5 / self.steps), len(self.now.target)
        row = runs.as_row(self.epoch, lr, sums, n, seconds)
        measured = measure(predict(learner.student, data.test[0], data.mean, data.std),
                           data.test[1])
        row |= {f"{s.evaluate}_{k}": measured[k] for k in ("top1", "top5", "nll")}
        row["best_top1"] = max([r["best_top1"] for r in history] + [measured["top1"]])
        history.append(row)
        if save:
            for group in learner.optimizer.param_groups:
                group.update(lr=lr, fused=None)
            runs.save(self.folder, s, data, learner, history)
            runs.write_metrics(self.folder, history)
            self.use_device_rate()
        return measured["top1"]


def open_runs(stack, rows, group, seed, device):
    """([Run], data): those that are not finished, begun or gone on with."""
    device, opened, data = pick_device(device), [], None
    if device.type == "mps":
        raise UserError("--device mps: has not been tried here; give cpu, or take results/run.py")
    for name, flags in rows.items():
        folder = ROOT / "results" / group / name / f"seed{seed}"
        given, saved = vars(make_parser(train.Settings, "").parse_args(flags.split())), None
        del given["run_dir"], given["resume"]
        s = train.resolve(train.Settings(**given | dict(
            seed=seed, device=device.type, amp=bool(given.get("amp")))))
        if resume := (folder / "config.json").exists():
            s, saved = runs.reopen({}, folder, lambda old: train.resolve(train.Settings(**old)))
        if not opened:
            first = s
        different = [k for k in SHARED if getattr(s, k) != getattr(first, k)]
        if different:
            raise UserError(f"{folder}: another {different[0]} than that of the other rows")
        stack.enter_context(runs.opened(s, folder, resume))
        if not data:
            data = load(s.dataset, s.data_dir, s.image_size, evaluate=s.evaluate)
            keep_on(device, data)
        learner = train.begin(s, data, device, saved, None)
        if learner.scaler.is_enabled():
            raise UserError(f"{folder}: float16, which this GPU takes for --amp, needs train.py's "
                            "scaled gradients; take results/run.py, or another GPU")
        history = runs.restore(saved, s, data, learner) if saved else []
        runs.start(folder, s, data, learner)
        opened.append((s, folder, learner, history))
    return [run for run in opened if len(run[3]) < run[0].epochs], data, device


def train_together(opened, data, device, minutes=math.inf):
    """Train the runs to their end, or until so many minutes are over. A run whose loss is not
    finite is left out from then on. Returns how many have not come to their end."""
    end = time.perf_counter() + 60 * minutes
    now, after = (Epoch(data, 1 + any(s.views == "both" for s, *_ in opened), device) for _ in "ab")
    first = opened[0][0]
    teacher = next((learner.teacher for _, _, learner, _ in opened if learner.teacher), None)
    digests = {learner.teacher_digest for _, _, learner, _ in opened if learner.teacher}
    if len(digests) > 1:
        raise UserError(f"--rows: have {len(digests)} teachers; train those of one at a time")
    autocast = opened[0][2].autocast
    all_runs = [Run(*one, now) for one in opened]
    aside = torch.cuda.Stream() if device.type == "cuda" else None

    def synchronize():
        if aside:
            torch.cuda.synchronize()

    def fill(epoch):
        """The pieces of Epoch.fill, on a stream of their own."""
        pieces = after.fill(first.seed, epoch, data, teacher, autocast)
        while True:
            with torch.cuda.stream(aside) if aside else contextlib.nullcontext():
                if next(pieces, pieces) is pieces:
                    return
            yield

    unfinished, ready = list(all_runs), None
    while unfinished:
        start = time.perf_counter()
        epoch = min(len(run.history) for run in unfinished) + 1
        here = [run for run in unfinished if len(run.history) + 1 == epoch]
        if ready != epoch:
            synchronize()
            for _ in fill(epoch):
                pass
        synchronize()
        now.copy_(after)
        for run in here:
            run.begin_epoch()
        synchronize()
        # The next epoch is prepared meanwhile: a piece after every few steps.
        ready, pieces = epoch + 1, fill(epoch + 1) if epoch < first.epochs else iter(())
        pause = max(1, here[0].steps * 2048 // len(now.target) - 1)
        for step in range(here[0].steps):
            for run in here:
                run.take_step(step)
            if step % pause == 0:
                next(pieces, None)
        for _ in pieces:
            pass
        synchronize()
        measuring = time.perf_counter()
        seconds, over = measuring - start, measuring > end
        for run in here:
            try:
                last = epoch == run.s.epochs
                top1 = run.end_epoch(data, seconds, last or over or epoch % SAVE_EVERY == 0)
                print(f"{run.folder.parent.name} {top1:.2f}", end="  ")
                if last:
                    runs.write_curves(run.folder)
                    unfinished.remove(run)
            except UserError as error:
                print(f"\n{error}; this run stops here")
                unfinished.remove(run)
        print(f"after epoch {epoch}, {seconds:.2f} s of training, "
              f"{time.perf_counter() - measuring:.2f} s of measuring", flush=True)
        if over:
            break
    return sum(len(run.history) < run.s.epochs for run in all_runs)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--rows", nargs="+", metavar="ROW",
                        help="only these; default all of the group")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf,
                        help="stop after the epoch in which they are over")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    rows = GROUPS[args.group][0]
    os.chdir(ROOT)
    with console.one_line_errors(parser), contextlib.ExitStack() as stack:
        chosen = {row: rows[row] for row in args.rows or rows}
        opened, data, device = open_runs(stack, chosen, args.group, args.seed, args.device)
        left = train_together(opened, data, device, args.minutes) if opened else 0
        print(f"{left} of {len(chosen)} runs have not come to their end")


if __name__ == "__main__":
    main()
