"""What the README promises about runs that are killed, stopped, starved of disk, or started twice.

The kills are real: child processes, SIGKILL at random moments, also within slowed-down writes.
Three in the suite; as many as you like with
    python -m pytest -m slow -n 0 tests/test_reliability.py -k kill --kills 50 -s
"""
import errno
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import File

import data
import train
from support import files

# Seconds a child may take before the test gives it up.
FOREVER = 300
pytestmark = pytest.mark.slow


class SlowFile(File):
    """Writes in four pieces with a pause after each, so that most of a run's time is in a write."""

    def write(self, content):
        if "px-" in self.file.name:
            # Decoded images are no part of a run.
            return self.file.write(content)
        quarter = len(content) // 4 + 1
        for start in range(0, len(content), quarter):
            self.file.write(content[start:start + quarter])
            self.file.flush()
            time.sleep(0.015)


def child(folder, arguments, slow, limit):
    """train.py's main() in a process of its own. It prints to folder/out and folder/err."""
    os.chdir(folder)
    sys.stdout, sys.stderr = open("out", "w"), open("err", "w")
    sys.argv = ["train.py", *arguments]
    torch.set_num_threads(1)
    # A shell has its background jobs ignore Ctrl-C, and these tests may be in one.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if slow:
        files.open = SlowFile
    if limit:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    train.main()


@pytest.fixture
def start(tmp_path, colors, color_teacher, forked):
    """start(*arguments) -> a child that trains sld on `colors` in tmp_path/run.

    Four epochs, two of them with the student swap.
    """
    fresh = ("--dataset", "folder", "--data-dir", colors, "--image-size", 16,
             "--student", "resnet8", "--teacher", "resnet8", "--teacher-checkpoint", color_teacher,
             "--epochs", 4, "--batch-size", 16, "--device", "cpu", "--run-dir", "run")
    children = []

    def begin(*arguments, folder=tmp_path, slow=True, limit=None):
        resume = arguments == ("--resume",)
        arguments = ("--resume", "--run-dir", "run") if resume else (*fresh, *arguments)
        arguments = [str(a) for a in arguments]
        process = forked.Process(target=child, args=(folder, arguments, slow, limit))
        process.start()
        children.append(process)
        return process
    yield begin
    for process in children:
        process.kill()
        process.join()


def finish(process):
    process.join(FOREVER)
    assert process.exitcode is not None, "the child hangs"
    return process.exitcode


def wait_for(path, process):
    deadline = time.monotonic() + FOREVER
    while not path.exists():
        assert time.monotonic() < deadline and process.exitcode is None, f"{path} never came"
        time.sleep(0.005)


def result(folder):
    """Rows without wall times, and the final weights of the student and of the optimiser."""
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")}
            for row in rows]
    last, best = (torch.load(folder / f"run/{name}.pt", weights_only=True)
                  for name in ("last", "best"))
    momentum = [state["momentum_buffer"] for state in last["optimizer"]["state"].values()]
    return rows, [*last["model"].values(), *momentum, *best["model"].values()]


def assert_same(one, other):
    assert one[0] == other[0]
    assert len(one[1]) == len(other[1]) and all(map(torch.equal, one[1], other[1]))


def found(run):
    """What a kill left behind, for the log."""
    last = run / "last.pt"
    epoch = torch.load(last, weights_only=True)["epoch"] if last.exists() else 0
    torn = [f"{path.name.split('.')[0]} half-written, {path.stat().st_size} bytes"
            for path in run.glob("*.tmp")]
    config = "there" if (run / "config.json").exists() else "not there"
    return ", ".join([f"config.json {config}", f"last.pt of epoch {epoch}", *torn])


def test_killed_at_any_moment_a_run_resumes_to_the_same_bits(start, tmp_path, request):
    kills, luck = request.config.getoption("--kills"), random.Random(0)
    (tmp_path / "whole").mkdir()
    process = start(folder=tmp_path / "whole")
    wait_for(tmp_path / "whole/run/env.json", process)
    begin = time.monotonic()
    assert finish(process) == 0
    whole, duration = result(tmp_path / "whole"), time.monotonic() - begin
    for k in range(kills):
        folder = tmp_path / f"killed{k}"
        folder.mkdir()
        process = start(folder=folder)
        wait_for(folder / "run/lock", process)
        moment = luck.uniform(0, duration)
        time.sleep(moment)
        process.kill()
        process.join()
        left = found(folder / "run")
        begun = (folder / "run/config.json").exists()
        again = start(*(["--resume"] if begun else []), folder=folder)
        assert finish(again) == 0, (folder / "err").read_text()
        assert_same(result(folder), whole)
        assert not list((folder / "run").glob("*.tmp"))
        print(f"kill {k + 1:2d} of {kills} after {moment:.3f} of {duration:.3f} s: {left}; "
              f"resumed, metrics and weights bit-equal", flush=True)
        shutil.rmtree(folder)


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process without a signal")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_and_says_how_to_go_on(start, tmp_path, number):
    process = start("--epochs", 40)
    wait_for(tmp_path / "run/last.pt", process)
    begin = time.monotonic()
    os.kill(process.pid, number)
    assert finish(process) == 130 and time.monotonic() - begin < 5
    err = (tmp_path / "err").read_text()
    epoch = torch.load(tmp_path / "run/last.pt", weights_only=True)["epoch"]
    how = f"epoch {epoch} is saved: python train.py --resume --run-dir run goes on after it"
    assert err.strip().splitlines()[-1] == f"train.py: interrupted; {how}"
    assert "Traceback" not in err and not list((tmp_path / "run").glob("*.tmp"))


def test_a_stopped_run_goes_on_to_the_same_bits(start, tmp_path):
    (tmp_path / "whole").mkdir()
    assert finish(start(folder=tmp_path / "whole")) == 0
    process = start()
    wait_for(tmp_path / "run/last.pt", process)
    process.terminate()
    finish(process)
    assert finish(start("--resume")) == 0
    assert_same(result(tmp_path), result(tmp_path / "whole"))


def one_line(folder, *culprits):
    err = [line for line in (folder / "err").read_text().splitlines()
           if line.startswith("train.py: ")]
    assert len(err) == 1 and all(str(culprit) in err[0] for culprit in culprits), err
    assert "Traceback" not in (folder / "err").read_text()


@pytest.mark.skipif(os.name == "nt", reason="needs a limit on file sizes")
def test_a_file_that_cannot_grow(start, tmp_path):
    """The system refuses: best.pt fits under the limit, last.pt with the optimiser does not."""
    process = start(limit=500_000)
    assert finish(process) == 2
    one_line(tmp_path, "run: cannot write epoch 1", "no epoch is saved")
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["best.pt", "config.json", "env.json", "lock"]
    assert finish(start("--resume")) == 0


@pytest.fixture(scope="module")
def whole(short, tmp_path_factory):
    """The history of a run that nothing disturbs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("whole"))
        return train.run(short(), "run")


@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EROFS, errno.EACCES, "deleted"], ids=[
    "full disk", "read-only file system", "no permission", "deleted run folder"])
@pytest.mark.parametrize("at", ["last.pt", "metrics.jsonl"])
def test_a_disk_that_fails_in_mid_run(short, whole, monkeypatch, kind, at):
    class Failing(SlowFile):
        def __init__(self, path, mode):
            if kind in (errno.EROFS, errno.EACCES) and self.due(path):
                raise OSError(kind, os.strerror(kind), str(path))
            super().__init__(path, mode)
            self.path = path

        def due(self, path):
            if at not in str(path) or not os.path.exists("run/last.pt"):
                return False
            return torch.load("run/last.pt", weights_only=True)["epoch"] == 2

        def write(self, content):
            if kind == errno.ENOSPC and self.due(self.path):
                self.file.write(content[:len(content) // 2])
                raise OSError(kind, os.strerror(kind))
            if kind == "deleted" and self.due(self.path):
                shutil.rmtree("run")
            self.file.write(content)
    monkeypatch.setattr(files, "open", Failing, raising=False)
    with pytest.raises(data.UserError, match="^run: cannot write epoch [23] ") as caught:
        train.run(short(), "run")
    monkeypatch.setattr(files, "open", open)
    if kind == "deleted":
        assert "no epoch is saved" in str(caught.value) and not os.path.exists("run")
        return
    assert "--resume --run-dir run goes on" in str(caught.value)
    assert not list(Path("run").glob("*.tmp"))
    assert torch.load("run/last.pt", weights_only=True)["epoch"] == 2
    again = train.run(train.Settings(), "run", resume=True)
    assert [row["loss"] for row in again] == [row["loss"] for row in whole]


def test_lost_metrics_come_back_from_the_checkpoint(trained):
    history = [json.loads(line) for line in open("run/metrics.jsonl")]
    os.remove("run/metrics.jsonl")
    train.run(train.Settings(), "run", resume=True)
    assert [json.loads(line) for line in open("run/metrics.jsonl")] == history


def test_two_runs_in_one_folder(start, tmp_path):
    (tmp_path / "second").mkdir()
    # So that each has its own output.
    (tmp_path / "second/run").symlink_to(tmp_path / "run", target_is_directory=True)
    first = start("--epochs", 12)
    wait_for(tmp_path / "run/last.pt", first)
    assert finish(start("--resume", folder=tmp_path / "second")) == 2
    one_line(tmp_path / "second", "run: another process is training there")
    assert finish(first) == 0 and len(result(tmp_path)[0]) == 12


def test_two_runs_that_start_at_once(start, tmp_path):
    (tmp_path / "run").mkdir()
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
        (folder / "run").symlink_to(tmp_path / "run", target_is_directory=True)
    statuses = [finish(process) for process in [start(folder=folder) for folder in folders]]
    assert sorted(statuses) == [0, 2]
    one_line(folders[statuses.index(2)], "run")
    assert len(result(tmp_path)[0]) == 4


def test_two_runs_that_need_the_same_teacher(short, colors, monkeypatch):
    arguments = dict(dataset="folder", data_dir=str(colors), image_size=16, teacher="resnet8",
                     student="resnet8", epochs=4, device="cpu")
    real, inside = train.train_epoch, []
    message = "another process is training there; wait until it is done"

    def second_run(*a):
        # While the first one trains the teacher.
        if not inside:
            inside.append(True)
            with pytest.raises(data.UserError, match=message):
                train.run(train.Settings(**arguments))
        return real(*a)
    monkeypatch.setattr(train, "train_epoch", second_run)
    assert len(train.run(train.Settings(**arguments))) == 4 and inside
    teacher = next(Path("runs").glob("teacher-*"))
    assert len((teacher / "metrics.jsonl").read_text().splitlines()) == 4


def test_the_teachers_of_two_folders_with_one_name_are_kept_apart(colors):
    shutil.copytree(colors, f"other/{colors.name}")
    os.remove(f"other/{colors.name}/train/red/0.png")
    for root in (colors, f"other/{colors.name}"):
        train.run(train.Settings(dataset="folder", data_dir=str(root), image_size=16,
                                 teacher="resnet8", epochs=4, device="cpu"))
    assert len(list(Path("runs").glob(f"teacher-{colors.name}-16px-*-resnet8"))) == 2
