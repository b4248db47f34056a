"""Acceptance on a GPU:  python tests/gpu_check.py

Compares what the project does on the GPU with what it does on the CPU, on images that are made
here. Prints a line for each check, and ends with status 1 where one failed; "info" is a measurement
and cannot fail. It takes some minutes; `--device cpu`, all that can run there, about one.
"""
import argparse
import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import benchmark
import torch
import torch.distributed as dist
from conftest import ROOT, write_colors
from torch.nn.parallel import DistributedDataParallel

import data
import eval as evaluation
import losses
import train
from models import create_model
from results import together
from support import console, glyphs
from support.compiled import compiled
from support.devices import keep_on, pick_device
from support.tables import read_run

# Steps of 64 images of glyphs, in an epoch in which sld's pseudo-teacher takes part.
CPU, STEPS, EPOCH = torch.device("cpu"), 20, 7
# A run on photographs, and the same for a command line. The check `photographs` trains the teacher.
COLORS = dict(dataset="folder", data_dir="colors", image_size=32, batch_size=50, student="resnet8")
TEACHER = dict(teacher="resnet8", teacher_checkpoint="teacher/last.pt")


def flags(settings):
    return [word for k, v in settings.items() for word in ("--" + k.replace("_", "-"), str(v))]


def epoch_on(device, wrap=lambda learner: learner, **settings):
    """(loss of each step, row of the log) of one epoch of sld on glyphs, in float32 unless said, at
    a rate that keeps differences small. wrap: f(Learner) -> the Learner to train."""
    s = train.resolve(train.Settings(**dict(device=device.type, lr=0.005, amp=False) | settings))
    images, found, take_step = data.load("glyphs"), [], train.take_step
    keep_on(device, images)
    learner = wrap(train.begin(s, images, device, None, None))

    def noted(*arguments):
        numbers = take_step(*arguments)
        found.append(numbers["loss"])
        return numbers
    with patch.object(train, "take_step", noted):
        row = train.train_epoch(s, EPOCH, learner, images)
    return torch.stack(found).cpu(), logged([row])


def logged(rows, but=("swap", "train", "test", "best")):
    """The numbers in these rows of metrics.jsonl, but for times: the losses, unless said."""
    return [v for row in rows for k, v in row.items()
            if not k.startswith((*but, "seconds", "images_per"))]


def within(limit, found, expected):
    """(whether every number is as expected to within `limit`, relative; how far it is)"""
    found, expected = (torch.as_tensor(v, dtype=torch.float64) for v in (found, expected))
    apart = ((found - expected).abs() / expected.abs().clamp(min=1e-9)).max().item()
    return apart <= limit, f"{apart:.1e}, at most {limit:.0e}"


# --- The checks: each yields (what, whether it holds or None, in figures) -------------------------

def default_run(device):
    first, last = train.run(train.Settings(epochs=2, device=device.type), "default")
    yield "its loss falls", last["loss"] < first["loss"], f"{first['loss']:.1f}, {last['loss']:.1f}"
    args = evaluation.make_parser().parse_args(["default/last.pt", "--device", device.type])
    yield "eval.py's nll", *within(1e-4, evaluation.evaluate(args)["nll"], last["test_nll"])


def precision(device):
    exact, _ = epoch_on(device)
    # In TF32 it is 1.5e-4.
    yield "float32, against the CPU", *within(5e-5, exact, epoch_on(CPU)[0])
    yield "mixed precision, against float32", *within(2e-2, epoch_on(device, amp=True)[0], exact)


def objectives(device):
    z_s, z_t, y = *3 * torch.randn(2, 128, 47), torch.randint(47, (128,))
    for name in losses.OBJECTIVES:
        objective, found = train.make_objective(train.resolve(train.Settings(method=name))), []
        for place, kind in ((device, torch.float32), (CPU, torch.float64)):
            x = z_s.detach().to(place, kind).requires_grad_()
            value = sum(objective(x, z_t.to(place, kind), y.to(place), EPOCH).values())
            value.backward()
            found.append((value.item(), x.grad.cpu().double()))
        (value, grad), (value_64, grad_64) = found
        apart = (grad - grad_64).norm() / grad_64.norm()
        yield f"{name}, against the CPU in float64", *within(1e-4, value, value_64)
        yield f"{name}, its gradient", apart < 1e-4, f"{apart:.1e}, at most 1e-04"


def views(device):
    noise = torch.randint(256, (512, 3, 32, 32), dtype=torch.uint8)
    for images, flip in ((data.load("glyphs").train[0], False), (noise, True)):
        numbers = data.draw(len(images), images.shape[-1], flip, torch.Generator().manual_seed(1))
        for view in (data.weak_view, data.strong_view):
            wrong = (view(images.to(device), numbers).cpu() != view(images, numbers)).sum().item()
            yield f"{view.__name__}, {images.shape[-1]} px", wrong == 0, f"{wrong} bytes differ"
    photos = torch.randint(256, (64, 3, 128, 128), dtype=torch.uint8)
    numbers = data.draw(64, 112, True, torch.Generator().manual_seed(1), 128, 0.35)
    there, here = (data.weak_view(photos.to(place), numbers, 112).cpu() for place in (device, CPU))
    levels, share = (there.int() - here).abs().max(), (there != here).double().mean()
    yield "photographs", levels <= 1 and share < 1e-3, f"{share:.0e} of them {levels} level apart"


def photographs(device):
    common = COLORS | dict(device=device.type)
    history = train.run(train.Settings(method="ce", epochs=4, **common), "teacher")
    yield "a teacher learns", history[-1]["test_top1"] > 60, f"{history[-1]['test_top1']:.0f} %"
    more = TEACHER | dict(student="mobilenet_v3_small", pretrained=False, epochs=2, lr=0.01)
    history = train.run(train.Settings(**common | more), "mobilenet")
    yield "a network of torchvision", len(history) == 2, f"loss {history[-1]['loss']:.1f}"


def kill_and_resume(device):
    n, log = 6 if device == CPU else 12, Path("killed/metrics.jsonl")
    s = COLORS | TEACHER | dict(device=device.type, epochs=n)
    with subprocess.Popen([sys.executable, ROOT / "train.py", *flags(s), "--run-dir", log.parent],
                          stdout=sys.stdout, stderr=sys.stderr) as process:
        while process.poll() is None and not log.exists():
            time.sleep(0.01)
        process.kill()
    done = len(read_run("killed")[1])
    yield "killed on the way", done < n, f"after {done} of {n} epochs"
    whole = logged(train.run(train.Settings(**s), "whole"), but=())
    resumed = logged(train.run(train.Settings(), "killed", resume=True), but=())
    same = sum(a == b for a, b in zip(whole, resumed, strict=True))
    yield "resumed, to the bit", same == len(whole), f"{same} of {len(whole)} numbers"


def several_processes(device):
    n = 2 if device == CPU else min(2, torch.cuda.device_count())
    done = subprocess.run(
        # --standalone: a free port, so that another torchrun on this machine is not in the way.
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n),
         ROOT / "train.py", *flags(COLORS | TEACHER | dict(device=device.type, epochs=1))],
        stdout=sys.stdout, stderr=sys.stderr)
    yield f"torchrun --nproc-per-node {n}", done.returncode == 0, f"status {done.returncode}"
    # train.py starts no group for one process.
    dist.init_process_group("gloo" if device == CPU else "nccl", rank=0, world_size=1,
                            init_method=f"file://{Path.cwd() / 'meeting'}")
    found, _ = epoch_on(device, lambda learner: dataclasses.replace(
        learner, parallel=DistributedDataParallel(learner.student, broadcast_buffers=False)))
    dist.destroy_process_group()
    yield "DDP, one process", *within(1e-5, found, epoch_on(device)[0])


def together_py(device):
    together.ROOT, s = Path.cwd(), COLORS | dict(epochs=3)
    rows = {"ce": s | dict(method="ce"), "sld": s | dict(method="sld") | TEACHER}
    with contextlib.ExitStack() as stack:
        opened, images, _ = together.open_runs(
            stack, {k: " ".join(flags(row)) for k, row in rows.items()}, "group", 0, device.type)
        together.train_together(opened, images, device)
    for name, row in rows.items():
        alone = train.run(train.Settings(**row, device=device.type, amp=False), f"alone-{name}")
        found = read_run(f"results/group/{name}/seed0")[1]
        yield f"{name}, against train.py", *within(1e-3, logged(found), logged(alone))


def faster_steps(device):
    if device == CPU:
        yield "--cuda-graph, --compile", None, "only here on a GPU"
        return
    works, (_, plain), images = {}, epoch_on(device), benchmark.random_data(64 * 40)
    for names in ((), ("cuda_graph",), ("compile",), ("cuda_graph", "compile")):
        what, more = " ".join(names) or "plain", dict.fromkeys(names, True)
        limit = 1e-3 if "compile" in names else 1e-5
        yield f"{what}, against plain", *within(limit, epoch_on(device, **more)[1], plain)
        ours = benchmark.Ours(("resnet56", "resnet20"), images, method="sld", **more)
        ours.learner = compiled(ours.learner) if "compile" in names else ours.learner
        works[what] = ours.epoch
    for name, seconds in benchmark.interleaved(works, 3).items():
        yield f"resnet56 -> resnet20, {name}", None, f"{1e3 * seconds / 40:.1f} ms a step"


def layouts(device):
    n, network = 100 if device == CPU else 10_000, create_model("resnet20", 100).to(device)
    images = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, device=device)

    def predict(layout):
        with patch.object(evaluation, "layout", lambda device: layout):
            evaluation.predict(network.to(memory_format=layout), images, (.5,) * 3, (.5,) * 3)
    kinds = torch.channels_last, torch.contiguous_format
    last, contiguous = benchmark.interleaved({k: lambda k=k: predict(k) for k in kinds}, 3).values()
    yield (f"eval.predict, {n} images", None,
           f"channels_last {1e3 * last:.0f} ms, {last / contiguous:.2f} times contiguous")


CHECKS = [default_run, precision, objectives, views, photographs, kill_and_resume,
          several_processes, together_py, faster_steps, layouts]


def main():
    parser = argparse.ArgumentParser(prog="gpu_check.py", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    with console.one_line_errors(parser):
        device = pick_device(parser.parse_args().device)
    work, begun, failed = Path(tempfile.mkdtemp(prefix="gpu_check-")), time.monotonic(), 0
    os.chdir(work)
    # Importing conftest.py tells child processes so, and the order of sums depends on it.
    torch.set_num_threads(1)
    # On a CPU, which is compared with itself, few steps show that the script runs.
    benchmark.DEVICE, glyphs.N_TEST = device, 500
    glyphs.N_TRAIN = 64 * (STEPS if device.type == "cuda" else 5)
    write_colors(Path("colors"))
    for check in CHECKS:
        rows = []
        try:
            with (open("log", "a") as log, contextlib.redirect_stdout(log),
                  contextlib.redirect_stderr(log)):
                rows.extend(check(device))
        except Exception as error:
            rows.append((type(error).__name__, False, str(error).split("\n")[0]))
        for what, holds, figures in rows:
            word = "info" if holds is None else "ok" if holds else "FAILED"
            failed += word == "FAILED"
            print(f"{check.__name__:18s}{what:40s}{word:8s}{figures}", flush=True)
    print(f"{failed} failed, {time.monotonic() - begun:.0f} s", flush=True)
    if failed:
        end = "".join((work / "log").read_text("utf-8", "replace").splitlines(True)[-60:])
        sys.exit(f"what was printed on the way: {work / 'log'}, which ends with\n{end}")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
