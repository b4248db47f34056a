"""Speed, as ratios against the field's usual pipeline:  python tests/benchmark.py [--json FILE]

That pipeline is written out plainly here: Pillow transforms in DataLoader workers, one a core and
at most eight, float32, a teacher pass for each view, one KL call for each temperature, view and
teacher, a host sync a step.
The other side is train.py's own train_epoch. Both sides of a ratio are timed in turn in one
process; figures are medians; a warm-up is left out. Let nothing else run.
"""
import argparse
import contextlib
import dataclasses
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import losses
import models
import train
from support import augment, photographs
from support.devices import environment
from swap import swap

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TEMPERATURES = (1, 2, 3, 4, 5, 6)
MEAN, STD = data.DATASETS["cifar100"].mean, data.DATASETS["cifar100"].std
WORKERS = min(8, os.cpu_count() or 1)
PAIRS = (("resnet20", "resnet8"), ("resnet56", "resnet20"))


def seconds(work):
    torch.cuda.synchronize() if DEVICE.type == "cuda" else None
    start = time.perf_counter()
    # A piece that leaves its own start-up out says how long it took.
    inside = work()
    torch.cuda.synchronize() if DEVICE.type == "cuda" else None
    return inside if isinstance(inside, float) else time.perf_counter() - start


def interleaved(works, repeats):
    """{name: median seconds} of {name: function}, run in turn; the first round is the warm-up."""
    times = {name: [] for name in works}
    for k in range(repeats + 1):
        for name, work in works.items():
            taken = seconds(work)
            if k:
                times[name].append(taken)
    return {name: statistics.median(t) for name, t in times.items()}


@contextlib.contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    yield
    torch.set_num_threads(before)


# --- The reference --------------------------------------------------------------------------------

def plain_loss(z_s, z_t, y, epoch=2, gamma=1):
    """(S6) for one view, one KL call at a time.

    The swapped student carries gradient, which turns NaN without log_target.
    """
    total = 0.1 * F.cross_entropy(z_s, y)
    for T in TEMPERATURES:
        total = total + 0.9 * T ** 2 * F.kl_div(F.log_softmax(z_s / T, 1),
                                                F.softmax(swap(z_t, y) / T, 1),
                                                reduction="batchmean")
        if epoch > gamma:
            total = total + 0.9 * T ** 2 * F.kl_div(F.log_softmax(z_s / T, 1),
                                                    F.log_softmax(swap(z_s, y) / T, 1),
                                                    reduction="batchmean", log_target=True)
    return total


def enhance(kind):
    return lambda image: kind(image).enhance(np.random.uniform(0.05, 0.95))


def affine(matrix):
    return lambda image: image.transform(image.size, Image.Transform.AFFINE,
                                         matrix(np.random.uniform(-0.3, 0.3)))


PILLOW = [ImageOps.autocontrast, ImageOps.equalize, lambda image: image,
          enhance(ImageEnhance.Brightness), enhance(ImageEnhance.Color),
          enhance(ImageEnhance.Contrast), enhance(ImageEnhance.Sharpness),
          lambda image: ImageOps.posterize(image, np.random.randint(4, 9)),
          lambda image: ImageOps.solarize(image, np.random.randint(256)),
          lambda image: image.rotate(np.random.uniform(-30, 30)),
          affine(lambda v: (1, v, 0, 0, 1, 0)), affine(lambda v: (1, 0, 0, v, 1, 0)),
          affine(lambda v: (1, 0, 32 * v, 0, 1, 0)), affine(lambda v: (1, 0, 0, 0, 1, 32 * v))]


def pillow_randaugment(image):
    for k in np.random.choice(len(PILLOW), 2):
        image = PILLOW[k](image)
    side, (x, y) = np.random.uniform(0, 16), np.random.uniform(0, 32, 2)
    ImageDraw.Draw(image).rectangle((max(0, x - side / 2), max(0, y - side / 2),
                                     min(32, x + side / 2), min(32, y + side / 2)), augment.GREY)
    return image


class PillowViews(torch.utils.data.Dataset):
    weak = v2.Compose([v2.RandomCrop(32, 4), v2.RandomHorizontalFlip()])
    tensor = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
                         v2.Normalize(MEAN, STD)])

    def __init__(self, part):
        self.images = part[0].permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = part[1].tolist()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        image = Image.fromarray(self.images[i])
        weak, strong = self.weak(image), pillow_randaugment(self.weak(image))
        return self.tensor(weak), self.tensor(strong), self.labels[i]


def reference_epoch(loader, teacher, student, optimizer, leave_out=4):
    """Seconds a batch, without the first ones, in which the workers start."""
    taken, student = [], student.train()
    before = time.perf_counter()
    for weak, strong, y in loader:
        y, loss = y.to(DEVICE), 0
        for view in (weak.to(DEVICE), strong.to(DEVICE)):
            with torch.no_grad():
                z_t = teacher(view)
            loss = loss + plain_loss(student(view), z_t, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        now = time.perf_counter()
        taken.append(now - before)
        before = now
    return sum(taken[leave_out:]) / len(taken[leave_out:])


# --- Ours -----------------------------------------------------------------------------------------

def random_data(n, classes=100):
    g = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=g)
    part = images, torch.randint(classes, (n,), generator=g)
    part = tuple(t.to(DEVICE) for t in part)
    return data.Dataset(part, part, [str(k) for k in range(classes)], MEAN, STD, True)


class Ours:
    """What train.run builds around train_epoch, on random images.

    epoch() is one epoch, past gamma for sld.
    """

    def __init__(self, pair, images, *, amp=None, objective=None, channels_last=True,
                 teacher=lambda network: network, **settings):
        classes = len(images.classes)
        memory = torch.channels_last if channels_last else torch.contiguous_format
        named = dict(teacher=pair[0]) if settings.get("method") != "ce" else {}
        self.s = train.resolve(train.Settings(student=pair[1], **named, epochs=100, optimizer="sgd",
                                              **settings))
        torch.manual_seed(0)
        student, frozen = (models.create_model(name, classes).to(DEVICE, memory_format=memory)
                           for name in (pair[1], pair[0]))
        frozen = teacher(frozen.eval().requires_grad_(False))
        if not channels_last:
            # train_epoch hands the views over in channels_last.
            for network in (student, frozen):
                network.register_forward_pre_hook(lambda module, x: (x[0].contiguous(),))
        amp = train.amp_by_default(DEVICE) if amp is None else amp
        self.learner = train.Learner(student, student, frozen if named else None, None,
                                     train.make_optimizer(self.s, student),
                                     *train.mixed_precision(DEVICE, amp))
        self.images, self.objective = images, objective

    def epoch(self):
        ours = train.make_objective
        with open_null() as quiet, contextlib.redirect_stderr(quiet):
            if self.objective:
                train.make_objective = lambda s: self.objective
            train.train_epoch(self.s, 100, self.learner, self.images)
        train.make_objective = ours


def open_null():
    return open("/dev/null" if sys.platform != "win32" else "nul", "w")


# --- The tables -----------------------------------------------------------------------------------

def peak_memory(work):
    """Most bytes of tensors alive at once while `work` runs, beyond those before it."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    steps = [event["args"] for event in events if event["name"] == "[memory]"]
    before = steps[0]["Total Allocated"] - steps[0]["Bytes"]
    return max(a["Total Allocated"] for a in steps) - before


def loss_table():
    rows, sizes = [], ((64, 10, 200), (64, 100, 200), (256, 1000, 10), (512, 21841, 2))
    for batch, classes, repeats in sizes:
        z_s, z_t = (4 * torch.randn(batch, classes, device=DEVICE) for _ in range(2))
        y = torch.randint(classes, (batch,), device=DEVICE)

        def backward(loss):
            x = z_s.clone().requires_grad_()
            value = loss(x)
            value.backward()
            return value.detach(), x.grad

        def our_loss(x):
            return sum(losses.sld(x, z_t, y, epoch=2, gamma=1).values())
        works = {"plain": lambda: backward(lambda x: plain_loss(x, z_t, y)),
                 "ours": lambda: backward(our_loss)}
        (value, gradient), (value_, gradient_) = (work() for work in works.values())
        with threads(1):
            memory = {name: peak_memory(work) for name, work in works.items()}
            taken = interleaved({name: lambda work=work: work() and None
                                 for name, work in works.items()}, repeats)
        apart = (gradient - gradient_).abs().max()
        rows.append({"(B, C)": f"({batch}, {classes})", "plain, ms": 1e3 * taken["plain"],
                     "ours, ms": 1e3 * taken["ours"],
                     "times faster": taken["plain"] / taken["ours"],
                     "peak memory, ours / plain": memory["ours"] / memory["plain"],
                     "largest difference of gradients": f"{apart:.0e}"})
    return rows


def through(batches):
    """Make them all, keep none."""
    for _ in batches:
        pass


def views_table():
    rows, ours, pillow = [], random_data(4096), random_data(512)
    for batch in (64, 256):
        with threads(1):
            plain = PillowViews([t.cpu() for t in pillow.train])
            works = {"plain": lambda: through(DataLoader(plain, batch, shuffle=True)),
                     "ours": lambda: through(data.batches(ours, batch, "both", 0, 1))}
            taken = interleaved(works, 5)
        rate = {"plain": 512 / taken["plain"], "ours": 4096 / taken["ours"]}
        rows.append({"batch": batch, "Pillow, pairs/s and core": rate["plain"],
                     "ours, pairs/s and core": rate["ours"],
                     "times faster": rate["ours"] / rate["plain"]})
    return rows


class BothViews:
    """What torchvision's own training scripts do to an image, for each of two views."""

    def __init__(self, strong):
        crop = [transforms.RandomResizedCrop(224, (0.35, 1)), transforms.RandomHorizontalFlip()]
        end = [transforms.ToTensor(), transforms.Normalize(data.DATASETS["imagenet"].mean,
                                                            data.DATASETS["imagenet"].std)]
        self.weak = transforms.Compose(crop + end)
        self.strong = transforms.Compose(crop + [transforms.RandAugment(2)] + end)
        self.both = strong

    def __call__(self, image):
        return (self.weak(image), self.strong(image)) if self.both else self.weak(image)


def photographs_table(n=512):
    """Two workers there, two threads here; the first epoch, in which workers start, is left out."""
    rows, g = [], np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as root, threads(2):
        for k in range(n):
            path = Path(root, f"photos/{'train' if k % 8 else 'val'}/{k // 8 % 4}/{k}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(g.integers(0, 256, (40, 50, 3), np.uint8))
            coarse.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
        photographs.CACHE = Path(root, "decoded")
        with contextlib.redirect_stdout(io.StringIO()):
            decoding = seconds(lambda: data.load("folder", Path(root, "photos"), 224) and None)
            again = seconds(lambda: data.load("folder", Path(root, "photos"), 224) and None)
            ours = data.load("folder", Path(root, "photos"), 224)
        size = len(ours.train[1])
        for views in ("weak", "both"):
            found = ImageFolder(Path(root, "photos/train"), BothViews(views == "both"))
            loader = DataLoader(found, 64, shuffle=True, num_workers=2, persistent_workers=True)
            taken = interleaved({
                "plain": lambda loader=loader: [None for _ in loader] and None,
                "ours": lambda views=views: [None for _ in data.batches(ours, 64, views, 0, 1)]
                and None}, 5)
            rows.append({"views": views,
                         "torchvision, two workers, images/s": size / taken["plain"],
                         "ours, two threads, images/s": size / taken["ours"],
                         "times faster": taken["plain"] / taken["ours"],
                         "decoding, images/s": n / decoding, "second start, s": again})
    return rows


def step_table():
    rows, images, steps = [], random_data(64 * 10), 10
    kinds = {"ce, weak": dict(method="ce"), "ce, both": dict(method="ce", views="both"),
             "kd, weak": dict(method="kd", temperatures=TEMPERATURES),
             "sld, weak": dict(method="sld", views="weak"),
             "kd, both": dict(method="kd", views="both", temperatures=TEMPERATURES),
             "sld, both": dict(method="sld")}
    for pair in PAIRS:
        taken = interleaved({name: Ours(pair, images, **kind).epoch
                             for name, kind in kinds.items()}, 11)
        rows.append({"teacher → student": " → ".join(pair)}
                    | {f"{name}, ms": 1e3 * t / steps for name, t in taken.items()}
                    | {f"sld / kd, {views}": taken[f"sld, {views}"] / taken[f"kd, {views}"]
                       for views in ("weak", "both")})
    return rows


def epoch_table():
    rows, images, few = [], random_data(64 * 40), random_data(64 * 28)
    loader = DataLoader(PillowViews([t.cpu() for t in few.train]), 64, shuffle=True,
                        num_workers=WORKERS)
    for pair in PAIRS:
        ours = Ours(pair, images, method="sld")
        teacher, student = (models.create_model(name, 100).to(DEVICE) for name in pair)
        teacher.eval().requires_grad_(False)
        optimizer = torch.optim.SGD(student.parameters(), 0.025, momentum=0.9, weight_decay=5e-4)
        works = {"plain": lambda: reference_epoch(loader, teacher, student, optimizer),
                 "ours": ours.epoch}
        if DEVICE.type == "cuda":
            works["graph"] = Ours(pair, images, method="sld", cuda_graph=True).epoch
        taken = interleaved(works, 5)
        rate = {name: (64 if name == "plain" else len(images.train[1])) / seconds
                for name, seconds in taken.items()}
        rows.append({"teacher → student": " → ".join(pair), "plain, images/s": rate["plain"],
                     "train.py, images/s": rate["ours"],
                     "times faster": rate["ours"] / rate["plain"]}
                    | ({"--cuda-graph, images/s": rate["graph"]} if "graph" in rate else {}))
    return rows


def plain_objective(z_s, z_t, y, epoch):
    return {"all": plain_loss(z_s, z_t, y)}


def sdpa(self, x):
    B, N, D = x.shape
    q, k, v = self.qkv(x).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
    return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D))


class TwoPasses(torch.nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return torch.cat([self.network(view) for view in x.chunk(2)])


# What: (how to take it away, why the result stays).
TRICKS = {
    "mixed precision": (
        dict(amp=False), "loss, sums and weights stay in float32; its losses follow those of "
                         "float32 (test_mixed_precision_follows_float32)"),
    "channels_last": (
        dict(channels_last=False), "a memory layout; the numbers are the same"),
    "one teacher pass for both views": (
        dict(teacher=TwoPasses), "in eval mode no row of a batch touches another"),
    "all temperatures in one computation, (S4) in closed form": (
        dict(objective=plain_objective), "the same sum; the golden vectors hold for both"),
}


def tricks_table():
    rows, images = [], random_data(64 * 10)
    variants = {"all": {}} | {name: without for name, (without, _) in TRICKS.items()}
    works = {pair: {name: Ours(pair, images, method="sld", **without).epoch
                    for name, without in variants.items()} for pair in PAIRS}
    taken = {pair: interleaved(group, 5) for pair, group in works.items()}
    for name, (_, why) in TRICKS.items():
        gains = {f"gain, {' → '.join(pair)}": taken[pair][name] / taken[pair]["all"]
                 for pair in PAIRS}
        rows.append({"what": name} | gains | {"why the result stays": why})
    vit, explicit = Ours(("resnet20", "vit_nano"), images, method="sld"), models.Block.attention

    def with_attention(function):
        models.Block.attention = function
        vit.epoch()
        models.Block.attention = explicit
    taken = interleaved({"explicit": lambda: with_attention(explicit),
                         "sdpa": lambda: with_attention(sdpa)}, 5)
    gain = taken["sdpa"] / taken["explicit"]
    rows.append({"what": f"explicit attention (resnet20 → vit_nano: {gain:.2f})"}
                | {f"gain, {' → '.join(pair)}": "-" for pair in PAIRS}
                | {"why the result stays": "the same formula as F.scaled_dot_product_attention"})
    return rows


# What: (batch size, classes, images).
GROWTH = {"batch 64, 100 classes, 6,400 images": (64, 100, 6400),
          "10 times the batch": (640, 100, 6400),
          "10 times the classes": (64, 1000, 6400),
          "10 times the images": (64, 100, 64000)}


def peak_of_process():
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    # Not ru_maxrss, in which a child starts at its parent's peak.
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        peak = next(line for line in lines if line.startswith("VmHWM"))
        return int(peak.split()[1]) / 2 ** 20
    return float("nan")


def growth_row(name):
    """Of a process of its own, whose peak memory it is."""
    batch, classes, n = GROWTH[name]
    ours = Ours(PAIRS[0], random_data(n, classes), method="sld", batch_size=batch)
    everything = ours.images
    # The warm-up is a shorter epoch.
    ours.images = dataclasses.replace(everything, train=tuple(t[:640] for t in everything.train))
    ours.epoch()
    ours.images = everything
    return {"": name, "images/s": n / seconds(ours.epoch), "peak memory, GiB": peak_of_process()}


def growth_table():
    def child(name):
        done = subprocess.run([sys.executable, __file__, "--growth", name], capture_output=True,
                              text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])
    rounds = [{name: child(name) for name in GROWTH} for _ in range(2)]
    return [{key: statistics.median(r[name][key] for r in rounds) if key else name
             for key in rounds[0][name]} for name in GROWTH]


def profile_table():
    ours = Ours(PAIRS[1], random_data(64 * 10), method="sld")
    ours.epoch()
    with torch.profiler.profile() as profile:
        ours.epoch()
    cost = {e.key: e.self_device_time_total if DEVICE.type == "cuda" else e.self_cpu_time_total
            for e in profile.key_averages()}
    total = sum(cost.values())
    top = sorted(cost, key=cost.get, reverse=True)[:7]
    return [{"operation": name, "share of the time, %": 100 * cost[name] / total} for name in top]


TABLES = {
    "Loss: sld, forward and backward, one thread": loss_table,
    "Views: weak and strong of each image, one core": views_table,
    "Photographs: JPEGs of 500 x 375 pixels, seen at 224": photographs_table,
    "Step: milliseconds for a batch of 64, views included; T = 1 … 6 for kd and sld": step_table,
    "End to end: SLD, both views, batch 64, CIFAR-sized images": epoch_table,
    "Growth: resnet20 → resnet8, SLD": growth_table,
    "Tricks: time without it / time with it, SLD": tricks_table,
    "Profile: resnet56 → resnet20, SLD": profile_table,
}


def cell(value):
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def render(report, only=None):
    """Markdown of a report's tables whose title starts with one of `only`."""
    lines = [report["header"]] if only is None else []
    for title, rows in report["tables"].items():
        if only is None or title.startswith(only):
            lines += ["", f"**{title}**" if only is None else f"*{title}*", "",
                      "| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
            lines += ["| " + " | ".join(map(cell, row.values())) + " |" for row in rows]
    return "\n".join(lines).strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the report there too")
    parser.add_argument("--only", nargs="+", metavar="TITLE", help="tables whose title starts so")
    parser.add_argument("--growth", choices=GROWTH, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.growth:
        print(json.dumps(growth_row(args.growth)))
        return
    start, e = time.perf_counter(), environment(DEVICE)
    header = (f"{e['device_name']}, {e['threads']} threads, {e['system']}, Python {e['python']}, "
              f"PyTorch {e['torch']}, torchvision {e['torchvision']}, {DEVICE.type}, "
              f"commit {e['commit'] or 'unknown'}; medians, warm-up left out")
    report = dict(header=header, tables={})
    print(header, flush=True)
    for title, table in TABLES.items():
        if args.only is None or title.startswith(tuple(args.only)):
            report["tables"][title] = rows = table()
            print("\n" + render(dict(tables={title: rows}), (title,)), flush=True)
    report["seconds"] = time.perf_counter() - start
    print(f"\n{report['seconds']:.0f} seconds")
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n",
                                   encoding="utf-8")


if __name__ == "__main__":
    main()
