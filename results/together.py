"""Several runs of one seed beside each other on one GPU:
    python results/together.py GROUP [--rows ROW …] [--seed 0] [--minutes 9]

They share their order, their views and their teacher, so these are made once, and one CUDA graph
holds a step of all of them, each on a stream of its own. For the schedule "step" only. Each run's
folder, results/GROUP/<row>/seed<k>, is that of train.py, which goes on with it on any machine:
    python train.py --resume --run-dir results/GROUP/ROW/seed0 --device cpu
Stops at the end of an epoch once the minutes are over; the same command goes on.
"""
import argparse
import functools
import itertools
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
SAVE_EVERY = 10


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


def together(runs, device):
    """compute(epoch, target, views, teacher's logits): a whole step of every run, and the numbers
    of all in one tensor. On a GPU each run has a stream of its own."""
    cuda, streams = device.type == "cuda", [None] * len(runs)
    if cuda:
        # Before the teacher, which works ahead.
        streams = [torch.cuda.Stream(priority=-1) for _ in runs]

    def compute(epoch, target, *tensors):
        views, z_t = tensors[:len(tensors) // 2], tensors[len(tensors) // 2:]
        start, found = torch.cuda.current_stream() if cuda else None, []
        for run, stream in zip(runs, streams):
            mine = views if run.s.views == "both" else views[:1]
            z_mine = torch.cat(z_t[:len(mine)])
            run.learner.teacher = (lambda _, z_mine=z_mine: z_mine) if run.teacher else None
            if cuda:
                stream.wait_stream(start)
            with torch.cuda.stream(stream):
                numbers = train.take_step(run.s, epoch, run.learner, run.objectives, mine, target,
                                          len(target), 1.0)
                run.learner.optimizer.step()
                found.append(torch.stack([*numbers.values()]))
            run.names = list(numbers)
        for stream in streams:
            if cuda:
                start.wait_stream(stream)
        return torch.cat(found)
    return compute


def ahead(found, teacher, autocast, device):
    """Of the batches `found`: (labels, views, the teacher's logits of each view). The next ones
    are made, and the teacher is asked about many of them at once, while the last are worked on."""
    cuda = device.type == "cuda"
    stream = torch.cuda.Stream() if cuda else None

    @torch.no_grad()
    def following():
        some, made = list(itertools.islice(found, 16)), []
        if some:
            with torch.cuda.stream(stream), autocast:
                sizes = [len(target) for _, target in some]
                z_t = [teacher(torch.cat(view).contiguous(memory_format=layout(device))).float()
                       .split(sizes) for view in zip(*(views for views, _ in some))]
                made = [(target, *[v.contiguous(memory_format=layout(device)) for v in views], *z)
                        for (views, target), *z in zip(some, *z_t)]
        return made, stream.record_event() if cuda else None

    with ThreadPoolExecutor(1) as pool:
        # More than the batches that data.py makes at once.
        waiting = [pool.submit(following) for _ in range(10)]
        while True:
            made, event = waiting.pop(0).result()
            if not made:
                return
            waiting.append(pool.submit(following))
            if cuda:
                torch.cuda.current_stream().wait_event(event)
            for tensors in made:
                for tensor in tensors if cuda else ():
                    tensor.record_stream(torch.cuda.current_stream())
                yield tensors


def constants(run, epoch):
    """What a recording of this run's step would hold fast besides its settings."""
    s = run.s
    return (s.gamma is not None and epoch > s.gamma, s.kd_warmup and min(epoch / s.kd_warmup, 1),
            train.learning_rate(s, epoch - 0.5))


def train_together(runs, data, device, seconds_left, record=True):
    """Epoch by epoch, as train.run does, until all are done or the time is over."""
    begun, s = time.perf_counter(), runs[0].s
    (images, labels), n = data.test, len(data.train[1])
    teacher = next(run.teacher for run in runs if run.teacher)
    # Of its own, since it belongs to the thread that works ahead.
    autocast, _ = train.mixed_precision(device, s.amp)
    both = "both" if any(run.s.views == "both" for run in runs) else "weak"
    compute = together(runs, device)
    epochs, steps = range(len(runs[0].history) + 1, s.epochs + 1), -(-n // s.batch_size)
    feed = ahead(itertools.chain.from_iterable(
        batches(data, s.batch_size, both, s.seed, epoch, device=device) for epoch in epochs),
        teacher, autocast, device)
    known, step_of, longest = None, None, 0
    for epoch in epochs:
        start, log = time.perf_counter(), []
        for run in runs:
            run.learner.student.train()
            for group in run.learner.optimizer.param_groups:
                # With the schedule "step" and no warm-up it is the same all the epoch.
                group["lr"] = train.learning_rate(run.s, epoch - 0.5)
        if known != [constants(run, epoch) for run in runs]:
            known = [constants(run, epoch) for run in runs]
            step_of = functools.partial(compute, epoch)
            if device.type == "cuda" and record:
                step_of = Recorded(step_of)
        for tensors in itertools.islice(feed, steps):
            log.append(step_of(*tensors))
        numbers = torch.stack(log).double().cpu()
        if not numbers.isfinite().all():
            raise UserError(f"epoch {epoch}: a loss is not finite")
        sums, seconds, at = numbers.sum(0).tolist(), time.perf_counter() - start, 0
        over = time.perf_counter() - begun + longest > seconds_left or epoch == s.epochs
        for run in runs:
            mine = dict(zip(run.names, sums[at:]))
            at += len(run.names)
            row = train.summary(epoch, run.learner.optimizer.param_groups[0]["lr"], mine, n, 0,
                                seconds)
            measured = measure(predict(run.learner.student, images, data.mean, data.std), labels)
            row |= {f"{s.evaluate}_{k}": measured[k] for k in ("top1", "top5", "nll")}
            row["best_top1"] = max([r["best_top1"] for r in run.history] + [measured["top1"]])
            run.history.append(row)
            if over or epoch % SAVE_EVERY == 0:
                run.learner.teacher = run.teacher
                train.save(run.folder, run.s, data, run.learner, run.history)
                train.write_metrics(run.folder, run.history)
        print(f"{epoch:5d} {time.perf_counter() - start:6.2f} s ({seconds:.2f} in steps)  "
              + "  ".join(f"{run.s.method} {row['test_top1']:.2f}" for run in runs
                          for row in run.history[-1:]), flush=True)
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
    args, begun = parser.parse_args(), time.perf_counter()
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
    if any(run.s.schedule != "step" or run.s.warmup for run in runs):
        parser.error("the learning rate must be constant within an epoch: --schedule step")
    if len({tuple(getattr(run.s, k) for k in alike) + (len(run.history),) for run in runs}) > 1:
        parser.error("these rows are not at the same epoch, or differ in data, length or precision")
    train_together(runs, data, device, 60 * args.minutes - (time.perf_counter() - begun))


if __name__ == "__main__":
    main()
