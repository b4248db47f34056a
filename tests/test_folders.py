"""Image folders: decoded once into one file, which is whole or not there."""
import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
from conftest import File
from PIL import Image
from torchvision import transforms

import data
import folders

ROOT = Path(__file__).parent.parent


def test_a_second_start_does_not_decode(colors, monkeypatch, capsys):
    first = data.load("folder", colors, 14)
    assert capsys.readouterr().out.count("decoding") == 2
    monkeypatch.setattr(folders, "read_image", None)
    second = data.load("folder", colors, 14)
    assert capsys.readouterr().out == ""
    for one, other in zip((*first.train, *first.test), (*second.train, *second.test)):
        assert torch.equal(one, other)
    assert first.digests[0] == second.digests[0]


@pytest.mark.parametrize("change", ["added", "removed", "other time", "other size", "other pixels",
                                    "renamed", "none", "another place", "another image size"])
def test_the_digest_tells_images_apart(colors, tmp_path, capsys, change):
    """By their names and pixels. What may have changed is decoded anew."""
    root = shutil.copytree(colors, tmp_path / "copy")
    before, image = data.load("folder", root, 14).digests[0], root / "train/red/7.png"
    capsys.readouterr()
    if change == "added":
        shutil.copy2(image, root / "train/red/new.png")
    elif change == "removed":
        image.unlink()
    elif change == "other time":
        os.utime(image, ns=(1, 1))
    elif change == "other size":
        about = image.stat()
        image.write_bytes(image.read_bytes() + b"\0")
        os.utime(image, ns=(about.st_atime_ns, about.st_mtime_ns))
    elif change == "other pixels":
        shutil.copy(root / "train/red/8.png", image)
    elif change == "renamed":
        image.rename(root / "train/red/other.png")
    elif change == "another place":
        root = root.rename(tmp_path / "moved")
    after = data.load("folder", root, 15 if change == "another image size" else 14).digests[0]
    same = after == before
    assert same == (change in ("none", "another place", "other time", "other size"))
    assert ("decoding" in capsys.readouterr().out) == (change != "none")


def test_a_kill_in_mid_decoding_leaves_nothing_that_is_taken_for_whole(colors, tmp_path):
    script = ("import sys, time; sys.path.insert(0, sys.argv[1]); import data, folders\n"
              "real = folders.read_image\n"
              "folders.read_image = lambda *a: time.sleep(0.05) or real(*a)\n"
              "data.load('folder', sys.argv[2], 63)")
    process = subprocess.Popen([sys.executable, "-c", script, ROOT, colors], cwd=tmp_path)
    # Several images of 72 pixels fill its buffer.
    while not any(path.stat().st_size > 72 * 72 * 3 * 3 for path in Path("data").glob("*.tmp")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert len(list(Path("data").glob("*.tmp"))) == 1 and not list(Path("data").glob("*.npy"))
    Path("data/notes.tmp").write_text("not ours")
    images = data.load("folder", colors, 63).train[0]
    assert len(images) == 120 and all(image.any() for image in images)
    assert [path.name for path in Path("data").glob("*.tmp")] == ["notes.tmp"]


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", "cut", b"hello" * 100])
def test_a_damaged_array_is_decoded_again(colors, capsys, damage):
    whole = data.load("folder", colors, 14).train[0].clone()
    path, = Path("data").glob("*-train-*.npy")
    path.write_bytes(path.read_bytes()[:-1] if damage == "cut" else damage)
    capsys.readouterr()
    assert torch.equal(data.load("folder", colors, 14).train[0], whole)
    assert capsys.readouterr().out.count("decoding") == 1


@pytest.mark.parametrize("when", ["before", "in the middle"])
def test_a_full_disk_is_one_line_with_the_bytes(colors, monkeypatch, when):
    if when == "before":
        full = shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000)
        monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: full)
    else:
        class Full(File):
            def write(self, content):
                if self.file.tell() > 10_000:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self.file.write(content)
        monkeypatch.setattr(folders, "open", Full, raising=False)
    with pytest.raises(data.UserError, match=f"the decoded images need {120 * 3 * 16 ** 2} bytes"):
        data.load("folder", colors, 14)
    assert not list(Path("data").glob("*.npy*"))


def test_a_damaged_image_leaves_no_array(colors, tmp_path):
    root = shutil.copytree(colors, tmp_path / "copy")
    (root / "val/red/3.png").write_bytes(b"no image")
    with pytest.raises(data.UserError, match="3.png: not a readable image"):
        data.load("folder", root, 14)
    assert len(list(Path("data").glob("*.npy*"))) == 1


def test_two_starts_at_once_decode_once(colors, capsys):
    Path("data").mkdir()
    lock = filelock.FileLock("data/decoding.lock")
    lock.acquire()
    loaded = []
    second = threading.Thread(target=lambda: loaded.append(data.load("folder", colors, 14)))
    second.start()
    said = ""
    while "waiting for the process that prepares images" not in said:
        assert second.is_alive()
        said += capsys.readouterr().out
        time.sleep(0.01)
    assert "decoding" not in said and not list(Path("data").glob("*.npy*"))
    lock.release()
    second.join()
    assert len(loaded[0].train[1]) == 120


def test_an_image_is_read_as_torchvision_measures(tmp_path):
    """Its shorter side made 256 pixels, and the middle square: also of a large JPEG, which is
    decoded at a part of its size, and of one that lies on its side."""
    g = np.random.default_rng(0)
    for name, shape in (("a.png", (300, 421)), ("b.png", (301, 200)), ("c.jpg", (1500, 2100))):
        coarse = Image.fromarray(g.integers(0, 256, (9, 9, 3), np.uint8))
        image, exif = coarse.resize(shape[::-1], Image.Resampling.BICUBIC), Image.Exif()
        # Turned by a quarter.
        exif[274] = 6
        image.save(tmp_path / name, quality=95, exif=exif if name == "c.jpg" else None)
        if name == "c.jpg":
            image = image.transpose(Image.Transpose.ROTATE_270)
        theirs = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(256)])(image)
        ours = folders.read_image(str(tmp_path / name), 256)
        assert ours.shape == (3, 256, 256) and ours.dtype == np.uint8
        difference = np.abs(ours - np.asarray(theirs).transpose(2, 0, 1).astype(float))
        # Up to half a pixel lies between the two squares.
        assert difference.mean() < 2, name


def test_the_test_part_alone_needs_no_training_part(colors, tmp_path):
    shutil.copytree(colors / "val", tmp_path / "alone/val")
    loaded = data.load("folder", tmp_path / "alone", 14, train=False)
    assert loaded.train is None and loaded.classes == ["blue", "green", "red"]
    assert loaded.test[0].shape == (60, 3, 14, 14)
