"""Several processes train one student: as torchrun starts them, with gloo on the CPU."""
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_reliability import FOREVER, finish, wait_for

import data
import models
import train

pytestmark = pytest.mark.slow


class NoNorm(torch.nn.Module):
    """Without batch norm, each process's own part of a batch gives what the whole gives."""

    def __init__(self, num_classes, image_size):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, 2, 1)
        self.fc = torch.nn.Linear(8, num_classes)

    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3)))


def child(folder, environment, words, prepare):
    """train.py's main() in a process of its own. It prints to folder/out<its id> and folder/err…"""
    os.environ |= environment
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        # Gloo does not print by way of Python.
        os.dup2(os.open(f"{name}{os.getpid()}", os.O_CREAT | os.O_WRONLY), number)
    sys.argv = ["train.py", *words]
    torch.set_num_threads(1)
    models.MODELS["nonorm"] = (NoNorm, {})
    prepare()
    train.main()


def nothing():
    pass


@pytest.fixture
def start(tmp_path, colors, color_teacher, forked):
    """start(*flags, world=2) -> the processes of one run of sld on `colors` in tmp_path/run."""
    started = []
    flags = ("--dataset", "folder", "--data-dir", colors, "--image-size", 16, "--student",
             "nonorm", "--teacher", "resnet8", "--teacher-checkpoint", color_teacher, "--epochs", 1,
             "--batch-size", 50, "--device", "cpu", "--no-amp", "--run-dir")

    def begin(*more, folder="run", world=2, resume=False, prepare=nothing, without=()):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = ("--resume", "--run-dir") if resume else flags
        for flag in without:
            at = words.index(flag)
            words = words[:at] + words[at + 2:]
        words = [*map(str, words), folder, *map(str, more)]
        for rank in range(world):
            environment = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                               MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            process = forked.Process(target=child, args=(tmp_path, environment, words, prepare))
            process.start()
            started.append(process)
        return started[-world:]
    yield begin
    for process in started:
        process.kill()
        process.join()


@pytest.fixture
def ends(tmp_path):
    """ends(processes) -> (status, standard output, standard error) of each."""
    return lambda processes: [
        (finish(process), *((tmp_path / f"{name}{process.pid}").read_text()
                            for name in ("out", "err"))) for process in processes]


def weights(folder):
    return torch.load(folder / "last.pt", weights_only=True)["model"]


@pytest.mark.parametrize("world", [3])
def test_an_epoch_is_that_of_one_process(start, ends, tmp_path, world):
    """120 images in batches of 50, a tail of 20; 50 is no multiple of 3."""
    one, = ends(start(folder="one", world=1))
    first, *others = ends(start(world=world))
    assert one[0] == first[0] == 0, (one[2], first[2])
    assert f"in {world} processes" in first[1]
    for status, out, err in others:
        # Gloo itself greets on standard output.
        assert status == 0 and all("Gloo" in line for line in out.splitlines()), (out, err)
    for a, b in zip(weights(tmp_path / "one").values(), weights(tmp_path / "run").values()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    a, b = (json.loads((tmp_path / name / "metrics.jsonl").read_text()) for name in ("one", "run"))
    for key in a.keys() - {"seconds", "images_per_second"}:
        assert a[key] == pytest.approx(b[key], rel=1e-4), key


def test_the_shares_are_the_batches(colors):
    """Also where a tail has fewer images than there are processes."""
    loaded = data.load("folder", colors, 16)
    batch, world = 17, 5
    whole = list(data.batches(loaded, batch, "both", 0, 1))
    shares = [list(data.batches(loaded, batch, "both", 0, 1, rank, world)) for rank in range(world)]
    assert len(whole[-1][1]) == 1
    for step, (views, target) in enumerate(whole):
        for rank in range(world):
            own_views, own = shares[rank][step]
            rows = range(rank, len(target), world) or range(1)
            assert torch.equal(own, target[list(rows)])
            for view, own_view in zip(views, own_views):
                assert torch.equal(own_view, view[list(rows)])


def test_resume_is_exact_for_the_same_number_of_processes(start, ends, tmp_path):
    assert [end[0] for end in ends(start("--epochs", 4, folder="whole"))] == [0, 0]
    processes = start("--epochs", 4)
    wait_for(tmp_path / "run/last.pt", processes[0])
    for process in processes:
        process.terminate()
    ends(processes)
    assert [end[0] for end in ends(start(resume=True))] == [0, 0]
    whole, run = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert all(torch.equal(whole[k], run[k]) for k in whole)


def slow_teacher():
    train.RECIPES["folder", "sgd"]["epochs"] = 2
    save, get_teacher = train.runs.save, train.get_teacher
    train.runs.save = lambda *a: time.sleep(1) or save(*a)

    def seen(*a):
        teacher, digest = get_teacher(*a)
        Path(f"digest{train.process()[0]}").write_text(digest)
        return teacher, digest
    train.get_teacher = seen


def test_all_learn_from_the_teacher_of_the_last_epoch(start, ends, tmp_path):
    statuses = ends(start("--student", "resnet8", prepare=slow_teacher,
                          without=["--teacher-checkpoint"]))
    assert [end[0] for end in statuses] == [0, 0], statuses
    assert (tmp_path / "digest0").read_text() == (tmp_path / "digest1").read_text()


def test_a_process_that_dies_ends_the_run(start, ends, tmp_path):
    processes = start("--epochs", 400)
    wait_for(tmp_path / "run/last.pt", processes[0])
    processes[1].kill()
    status, _, err = ends(processes[:1])[0]
    assert status != 0 and err.strip().count("\n") == 0 and "Traceback" not in err, err
    assert "another process of this run is gone" in err and "--resume" in err
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["history"]


def test_the_readmes_commands(colors, color_teacher, tmp_path):
    """The words of both in one, of which the last of a flag counts. Each process would be aborted
    when its interpreter ends, as gloo can do it."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(
        "import atexit, os\nif 'LOCAL_RANK' in os.environ:\n    atexit.register(os.abort)\n")
    readme = (ROOT / "README.md").read_text("utf-8")
    lines = re.findall(r"^torchrun ([^#\n]*) train.py ([^#\n]*)", readme, re.M)
    assert len(lines) == 2
    processes, flags = (" ".join(parts).split() for parts in zip(*lines))
    shorter = ("--dataset", "folder", "--data-dir", colors, "--image-size", 16, "--epochs", 1,
               "--student", "resnet8", "--teacher", "resnet8", "--teacher-checkpoint",
               color_teacher)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", *processes,
                           "--nproc-per-node", "2", ROOT / "train.py", *flags, *map(str, shorter)],
                          cwd=tmp_path, text=True, capture_output=True, timeout=2 * FOREVER,
                          env=os.environ | dict(PYTHONPATH=str(tmp_path / "site")))
    assert done.returncode == 0, done.stderr
    assert "in 2 processes" in done.stdout and done.stdout.count("last epoch") == 1
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_sigterm_says_how_to_go_on(start, ends, tmp_path):
    processes = start("--epochs", 400)
    wait_for(tmp_path / "run/last.pt", processes[0])
    for process in processes:
        process.terminate()
    first, second = ends(processes)
    command = "torchrun --standalone --nproc-per-node 2 train.py --resume"
    assert first[0] != 0 and command in first[2], first[2]
    assert second[0] != 0 and "Traceback" not in first[2] + second[2]


def test_a_batch_smaller_than_the_number_of_processes(start, ends):
    first, _ = ends(start("--batch-size", 1))
    assert first[0] == 2 and "--batch-size 1" in first[2] and first[2].count("\n") == 1


def test_mlkd_wants_all_images_of_a_batch_in_one_process(start, ends, tmp_path):
    first, _ = ends(start("--method", "mlkd"))
    assert first[0] == 2 and "--method mlkd: compares the images of a batch" in first[2]
    assert first[2].count("\n") == 1 and not (tmp_path / "run/last.pt").exists()


def test_the_learner_of_one_process_is_not_wrapped():
    assert train.process() == (0, 1)
