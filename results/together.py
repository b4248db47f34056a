"""Several runs of one seed beside each other on one GPU:
    python results/together.py GROUP [--rows ROW …] [--seed 0] [--minutes 9]

They share their data, their order, their views and their teacher, so both are made once, and one
CUDA graph holds a step of all of them, each on a stream of its own. Each run's folder,
results/GROUP/<row>/seed<k>, is that of train.py, which can go on with it on any machine:
    python train.py --resume --run-dir results/GROUP/ROW/seed0 --device cpu
Stops at the end of an epoch once the minutes are over; the same command goes on.
"""
import argparse
import functools
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]

import torch  # noqa: E402
from run import GROUPS  # noqa: E402

import train  # noqa: E402
from data import batches, load  # noqa: E402
from eval import layout, load_model, measure, pick_device, predict  # noqa: E402
from folders import UserError  # noqa: E402
from support.cuda_graph import Recorded  # noqa: E402
from train import Settings  # noqa: E402

# A run is saved after each of so many epochs, and at its end.
SAVE_EVERY = 5


def flags_to_settings(flags):
    """The Settings of a row of GROUPS, by train.py's own command line."""
    found, argv, run = [], sys.argv, train.run
    try:
        sys.argv, train.run = ["train.py", *flags.split()], lambda s, *_: found.append(s)
        train.main()
    finally:
        sys.argv, train.run = argv, run
    return found[0]


class Run:
    """A run as train.py keeps it: its settings, folder, learner and history."""

    def __init__(self, settings, folder, data, device):
        self.folder = folder
        if (folder / "last.pt").exists():
            saved = load_model(folder / "last.pt")[1]
            self.s = train.resolve(Settings(**saved["settings"]))
        else:
            saved, self.s = None, train.resolve(settings)
            folder.mkdir(parents=True, exist_ok=True)
        self.learner, self.history = train.begin(self.s, data, device, saved)
        train.open_folder(folder, self.s, data, self.learner, resume=saved is not None)
        self.objectives = [train.make_objective(self.s, view) for view in ("weak", "strong")]
        self.teacher, self.names = self.learner.teacher, []


def together(runs, teacher, device):
    """compute(weak, strong, target, epoch): take_step of every run, and the numbers of all in one
    tensor. On a GPU the teacher and each run have a stream of their own."""
    cuda = device.type == "cuda"
    streams = [torch.cuda.Stream() if cuda else None for _ in range(1 + len(runs))]
    here = torch.cuda.current_stream if cuda else lambda: None

    def compute(epoch, weak, strong, target):
        start, both = here(), [weak, strong]
        if cuda:
            for stream in streams:
                stream.wait_stream(start)
        with torch.cuda.stream(streams[0]), runs[0].learner.autocast:
            z_t = teacher(torch.cat(both)).float()

        def ready(images):
            """What the teacher says of `images`, the weak views or both: it stands there by now."""
            if cuda:
                here().wait_stream(streams[0])
            return z_t[:len(images)]

        found = []
        for run, stream in zip(runs, streams[1:]):
            run.learner.teacher = ready if run.teacher else None
            views = both if run.s.views == "both" else both[:1]
            with torch.cuda.stream(stream):
                numbers = train.take_step(run.s, epoch, run.learner, run.objectives, views, target,
                                          len(target), 1.0)
                found.append(torch.stack([*numbers.values()]))
            run.names = list(numbers)
        if cuda:
            for stream in streams:
                start.wait_stream(stream)
        return torch.cat(found)
    return compute


def ahead(batches):
    """The same batches, of which the next are made while the current one is worked on."""
    stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    def following():
        with torch.cuda.stream(stream):
            item = next(batches, None)
            return item, stream.record_event() if stream else None
    with ThreadPoolExecutor(1) as pool:
        waiting = [pool.submit(following) for _ in range(160)]
        while True:
            item, made = waiting.pop(0).result()
            if item is None:
                return
            if made:
                torch.cuda.current_stream().wait_event(made)
                for tensor in (*item[0], item[1]):
                    tensor.record_stream(torch.cuda.current_stream())
            waiting.append(pool.submit(following))
            yield item


def constants(run, epoch):
    """What a recording of this run's step would hold fast besides its settings."""
    s = run.s
    return s.gamma is not None and epoch > s.gamma, s.kd_warmup and min(epoch / s.kd_warmup, 1)


def train_together(runs, data, device, minutes, record=True):
    """Epoch by epoch, as train.run does, until all are done or the minutes are over."""
    begun = time.perf_counter()
    s, images, n = runs[0].s, data.test[0], len(data.train[1])
    teacher = next(run.teacher for run in runs if run.teacher)
    compute, steps = together(runs, teacher, device), -(-n // s.batch_size)
    parameters = [p for run in runs for p in run.learner.student.parameters()]
    known, step_of, longest = None, None, 0
    for epoch in range(len(runs[0].history) + 1, s.epochs + 1):
        start, log = time.perf_counter(), []
        for run in runs:
            run.learner.student.train()
        if known != [constants(run, epoch) for run in runs]:
            known = [constants(run, epoch) for run in runs]
            step_of = functools.partial(compute, epoch)
            if device.type == "cuda" and record:
                step_of = Recorded(step_of, parameters)
        source = batches(data, s.batch_size, "both", s.seed, epoch, device=device)
        for step, (views, target) in enumerate(ahead(source)):
            views = [v.to(device, memory_format=layout(device)) for v in views]
            log.append(step_of(*views, target))
            for run in runs:
                lr = train.learning_rate(run.s, epoch - 1 + (step + 0.5) / steps)
                for group in run.learner.optimizer.param_groups:
                    group["lr"] = lr
                run.learner.scaler.step(run.learner.optimizer)
                run.learner.scaler.update()
        numbers = torch.stack(log).double().cpu()
        if not numbers.isfinite().all():
            raise UserError(f"epoch {epoch}: a loss is not finite")
        sums, seconds, at = numbers.sum(0).tolist(), time.perf_counter() - start, 0
        over = time.perf_counter() - begun + longest > 60 * minutes or epoch == s.epochs
        for run in runs:
            mine = dict(zip(run.names, sums[at:]))
            at += len(run.names)
            row = train.summary(epoch, run.learner.optimizer.param_groups[0]["lr"], mine, n, 0,
                                seconds)
            measured = measure(predict(run.learner.student, images, data.mean, data.std),
                               data.test[1])
            row |= {f"{s.evaluate}_{k}": measured[k] for k in ("top1", "top5", "nll")}
            row["best_top1"] = max([r["best_top1"] for r in run.history] + [measured["top1"]])
            run.history.append(row)
            if over or epoch % SAVE_EVERY == 0:
                train.save(run.folder, run.s, data, run.learner, run.history)
                train.write_metrics(run.folder, run.history)
        print(f"{epoch:5d} {time.perf_counter() - start:6.2f} s ({seconds:.2f} in steps)  "
              + "  ".join(f"{run.s.method} {run.history[-1]['test_top1']:.2f}" for run in runs),
              flush=True)
        longest = max(longest, time.perf_counter() - start)
        if over:
            return


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="default all of the group")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    rows = GROUPS[args.group][0]
    device = pick_device(args.device)
    wanted = {row: flags_to_settings(f"{flags} --seed {args.seed} --device {device.type}")
              for row, flags in rows.items() if row in (args.rows or rows)}
    s = train.resolve(next(iter(wanted.values())))
    data = load(s.dataset, s.data_dir, s.image_size, evaluate=s.evaluate)
    if device.type == "cuda":
        data.train, data.test = (tuple(t.to(device) for t in p) for p in (data.train, data.test))
    runs = [Run(settings, ROOT / "results" / args.group / row / f"seed{args.seed}", data, device)
            for row, settings in wanted.items()]
    alike = ("dataset", "batch_size", "epochs", "seed", "amp", "evaluate")
    if len({tuple(getattr(run.s, k) for k in alike) + (len(run.history),) for run in runs}) > 1:
        parser.error("these rows are not at the same epoch, or differ in data, length or precision")
    train_together(runs, data, device, args.minutes)


if __name__ == "__main__":
    main()
