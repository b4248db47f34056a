import itertools
import json
import multiprocessing
import os
import shutil
import sys
import urllib.error
from pathlib import Path
from types import SimpleNamespace

# Tiny convolutions do not gain from threads, and other tests run beside. Also for child processes.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from support import glyphs, plots, report, runs

ROOT = Path(__file__).parent.parent


class File:
    """A file whose writes a test can replace."""

    def __init__(self, path, mode):
        self.file = open(path, mode)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


def write_images(root, layout):
    """Write {path: PIL image} below root."""
    for name, image in layout.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(root / name)
    return root


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=3,
                     help="how often test_reliability.py kills a run")
    parser.addoption("--draws", type=int, default=200,
                     help="how often test_random_input.py draws flags and files")


@pytest.fixture(autouse=True)
def own_folder_and_seed(tmp_path, monkeypatch):
    """Every test has its own runs/ and its own random numbers."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def quick_ends(monkeypatch):
    """The curves of a run are computed but not painted, a network is timed by a clock that goes a
    tenth of a second a reading, and nothing waits for the disk: each would take longer than the
    training in most tests."""
    def unpainted(folders):
        figure = plots.plot(folders)
        figure.savefig = lambda file: file.write(b"unpainted")
        return figure
    monkeypatch.setattr(runs, "plot", unpainted)
    ticks = itertools.count(0, 0.1)
    monkeypatch.setattr(report, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def painted(quick_ends, monkeypatch):
    """Runs paint their curves."""
    monkeypatch.setattr(runs, "plot", plots.plot)


@pytest.fixture(scope="session")
def images():
    """Smooth and noisy, bright and dark, and one flat image: (150, 3, 32, 32) uint8."""
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(150, 3, 4, 4, generator=g)
    smooth = torch.nn.functional.interpolate(coarse, 32, mode="bilinear")
    images = 255 * smooth + 8 * torch.randn(150, 3, 32, 32, generator=g)
    images[::3] *= 0.3
    images[0] = 77
    return images.clamp(0, 255).byte()


def write_colors(root):
    """Write an image folder learnt in a second: noisy red, green and blue, 16 px, 40 + 20 each."""
    g = np.random.default_rng(0)
    for part, n in (("train", 40), ("val", 20)):
        for channel, name in enumerate(("red", "green", "blue")):
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = g.integers(0, 200, (16, 16, 3), np.uint8)
                pixels[..., channel] = g.integers(90, 256, (16, 16), np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def colors(tmp_path_factory):
    return write_colors(tmp_path_factory.mktemp("colors"))


@pytest.fixture(scope="session")
def color_teacher(colors, tmp_path_factory):
    """A resnet8 trained on `colors`."""
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    settings = train.Settings(method="ce", dataset="folder", data_dir=str(colors), image_size=16,
                              student="resnet8", epochs=4, batch_size=16, device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        # Before any test has its own folder: the repository's data/ is left alone.
        patch.chdir(folder.parent)
        train.run(settings, folder)
    return folder / "last.pt"


@pytest.fixture(scope="session")
def short(colors, color_teacher):
    """Settings of a run that takes a second, to be changed with keyword arguments."""
    def make(**changes):
        common = dict(dataset="folder", data_dir=str(colors), image_size=16, student="resnet8",
                      epochs=4, batch_size=32, device="cpu")
        if changes.get("method", "sld") != "ce" and not changes.get("resume"):
            common |= dict(teacher="resnet8", teacher_checkpoint=str(color_teacher))
        return train.Settings(**(common | changes))
    return make


@pytest.fixture
def base(colors):
    """Flags of such a run, for `command`."""
    return ("--dataset", "folder", "--data-dir", colors, "--image-size", 16, "--student", "resnet8",
            "--teacher", "resnet8", "--device", "cpu", "--epochs", 2, "--batch-size", 32,
            "--run-dir", "run")


@pytest.fixture(scope="session")
def kept_run(colors, color_teacher, tmp_path_factory):
    """A folder with photos/, a copy of `colors`, and run/, an sld run on it of two epochs."""
    folder = tmp_path_factory.mktemp("kept")
    shutil.copytree(colors, folder / "photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.run(train.Settings(dataset="folder", data_dir="photos", image_size=16,
                                 student="resnet8", teacher="resnet8", epochs=2, batch_size=32,
                                 teacher_checkpoint=str(color_teacher), device="cpu"), "run")
    return folder


@pytest.fixture
def trained(kept_run, tmp_path):
    """A copy of that run, of its images and of what was decoded, in the test's own folder: run/."""
    shutil.copytree(kept_run, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


@pytest.fixture(scope="session")
def forked():
    """The context of multiprocessing whose processes have imported train.py when they start."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    # Not on every system.
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conftest", "matplotlib.pyplot"])
    with pytest.MonkeyPatch.context() as patch:
        # Where the server, which all tests share, finds the module.
        patch.setenv("PYTHONPATH", str(ROOT / "tests"))
        forkserver.ensure_running()
    return context


@pytest.fixture
def published(tmp_path, monkeypatch):
    """published(name, bias) puts weights of a torchvision network into torch's cache, under the
    name of the published file, and returns them; with a bias, class 0 always wins. Offline."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def offline(*arguments, **more):
        raise urllib.error.URLError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)

    def put(name, bias=None):
        state = torchvision.models.get_model(name).state_dict()
        if bias is not None:
            *_, last = state
            state[last.replace("bias", "weight")].zero_()
            state[last].zero_()[0] = bias
        url = torchvision.models.get_model_weights(name).DEFAULT.url
        path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path)
        return state
    return put


@pytest.fixture(scope="session")
def imagenet(tmp_path_factory):
    """1,000 classes of one training image each, and 20 test images of the first."""
    root = tmp_path_factory.mktemp("imagenet")
    for k in range(1000):
        (root / f"train/n{k:08d}").mkdir(parents=True)
        Image.new("RGB", (4, 4), (k % 256, k // 4, 80)).save(root / f"train/n{k:08d}/0.png")
    (root / "val/n00000000").mkdir(parents=True)
    for k in range(20):
        Image.new("RGB", (4, 4), (10 * k, 0, 80)).save(root / f"val/n00000000/{k}.png")
    return root


@pytest.fixture
def easy_glyphs(tmp_path, monkeypatch):
    """A data folder of glyphs learnt in seconds: three upright characters, no distractors. They
    need another teacher than that of the repository."""
    monkeypatch.setattr(train, "TEACHERS", {})
    easy = dict(CLASSES=list("OTx"), N_TRAIN=480, N_TEST=200, ROTATION=0, JITTER=0.05,
                DISTRACTORS=0, ZOOM=(1.1, 1.2), CONTRAST=(1, 1), NOISE=(0, 0.02))
    for name, value in easy.items():
        monkeypatch.setattr(glyphs, name, value)
    return tmp_path / "data"


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a script's main() as from the command line: (exit status, output, error output)."""
    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        capsys.readouterr()
        try:
            script.main()
            status = 0
        except SystemExit as end:
            status = end.code or 0
        out, err = capsys.readouterr()
        return status, out, err
    return run


@pytest.fixture(scope="session")
def write_run():
    """write_run(folder, accuracies, **settings) writes the logs of a run, with this top-1 after
    each of its epochs."""
    def write(folder, accuracies, **config):
        folder.mkdir(parents=True)
        config = dict(student="resnet8", evaluate="test") | config
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "env.json").write_text("{}")
        top1 = config["evaluate"] + "_top1"
        rows = [json.dumps({"epoch": i, top1: a}) + "\n" for i, a in enumerate(accuracies, 1)]
        (folder / "metrics.jsonl").write_text("".join(rows))
        return folder
    return write
