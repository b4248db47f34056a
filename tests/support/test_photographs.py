"""Image folders: which files are read and how; decoded once into one file, whole or not there."""
import errno
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
from conftest import ROOT, File, write_images
from PIL import Image
from torchvision import transforms

import data
import eval as evaluation
import train
from support import files, photographs, runs
from support.errors import UserError
from support.photographs import centre


def test_a_second_start_does_not_decode(colors, monkeypatch, capsys):
    first = data.load("folder", colors, 14)
    out = capsys.readouterr().out
    assert out.count("decoding") == 2 and "npy (0.1 MB)" in out
    monkeypatch.setattr(photographs, "read_image", None)
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
    script = ("import sys, time; sys.path.insert(0, sys.argv[1]); import data; "
              "from support import photographs\n"
              "real = photographs.read_image\n"
              "photographs.read_image = lambda *a: time.sleep(0.05) or real(*a)\n"
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
        monkeypatch.setattr(photographs.shutil, "disk_usage", lambda path: full)
    else:
        class Full(File):
            def write(self, content):
                if self.file.tell() > 10_000:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self.file.write(content)
        monkeypatch.setattr(files, "open", Full, raising=False)
    with pytest.raises(UserError, match=f"the decoded images need {120 * 3 * 16 ** 2} bytes"):
        data.load("folder", colors, 14)
    assert not list(Path("data").glob("*.npy*"))


def test_a_damaged_image_leaves_no_array(colors, tmp_path):
    root = shutil.copytree(colors, tmp_path / "copy")
    (root / "val/red/3.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="3.png: not a readable image.*; mend or remove it$"):
        data.load("folder", root, 14)
    assert len(list(Path("data").glob("*.npy*"))) == 1


@pytest.mark.parametrize("n", [3, 12])
def test_all_damaged_images_are_named_at_once(colors, tmp_path, n):
    root = shutil.copytree(colors, tmp_path / "copy")
    damaged = sorted((root / "val").rglob("*.png"))[1:n + 1]
    for path in damaged:
        path.write_bytes(b"no image")
    with pytest.raises(UserError) as error:
        data.load("folder", root, 14)
    first, others = str(error.value).split("; mend or remove it; likewise ")
    assert first.startswith(f"{damaged[0]}: not a readable image")
    assert others == (f"{n - 1} more: {', '.join(map(str, damaged[1:11]))}"
                      + (", …" if n > 11 else ""))


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
        ours = photographs.read_image(str(tmp_path / name), 256)
        assert ours.shape == (3, 256, 256) and ours.dtype == np.uint8
        difference = np.abs(ours - np.asarray(theirs).transpose(2, 0, 1).astype(float))
        # Up to half a pixel lies between the two squares.
        assert difference.mean() < 2, name


def test_the_test_part_alone_needs_no_training_part(colors, tmp_path):
    shutil.copytree(colors / "val", tmp_path / "alone/val")
    loaded = data.load("folder", tmp_path / "alone", 14, train=False)
    assert loaded.train is None and loaded.classes == ["blue", "green", "red"]
    assert loaded.test[0].shape == (60, 3, 14, 14)


def test_a_folder_of_any_modes_and_sizes(tmp_path):
    grey16 = Image.fromarray(np.full((40, 60), 51 * 256, np.uint16))
    root = write_images(tmp_path, {
        "train/cat/rgb.png": Image.new("RGB", (50, 30), (255, 0, 102)),
        "train/cat/grey.jpg": Image.new("L", (16, 16), 200),
        "train/dog/alpha.png": Image.new("RGBA", (9, 9), (10, 20, 30, 40)),
        "train/dog/deep.png": grey16,
        "train/dog/palette.gif": Image.new("P", (8, 8)),
        "val/cat/one.png": Image.new("1", (20, 20), 1),
        "val/dog/two.webp": Image.new("RGB", (200, 20))})
    loaded = data.load("folder", root, image_size=21)
    assert loaded.classes == ["cat", "dog"] and loaded.flip and loaded.area == 0.35
    # In a random order, with room to crop from.
    (images, labels), (tests, _) = loaded.train, loaded.test
    assert images.shape == (5, 3, 24, 24) and sorted(labels.tolist()) == [0, 0, 1, 1, 1]
    assert tests.shape == (2, 3, 21, 21)
    found = sorted(zip(labels.tolist(), images[:, :, 5, 5].tolist()))
    assert (0, [255, 0, 102]) in found and (1, [51] * 3) in found and (1, [217, 218, 220]) in found
    assert tests[0].unique().tolist() == [255]
    assert (loaded.mean, loaded.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert data.load("folder", root, 21, train=False).train is None


@pytest.mark.parametrize("link", ["..", "../..", ".", "../red", "../../train/red"])
def test_a_link_to_a_folder_above_multiplies_nothing(colors, tmp_path, link):
    root = shutil.copytree(colors, tmp_path / "photos")
    (root / "train/red/inner").mkdir()
    (root / "train/red/again").symlink_to(link, target_is_directory=True)
    (root / "train/red/inner/again").symlink_to("..", target_is_directory=True)
    assert len(data.load("folder", root, 16).train[1]) == 120


def test_a_folder_linked_at_two_depths_is_read_whole(colors, tmp_path):
    root = shutil.copytree(colors, tmp_path / "photos")
    (tmp_path / "pool/2020").mkdir(parents=True)
    for name in ("pool/own.png", "pool/2020/old.png"):
        shutil.copy(root / "train/red/0.png", tmp_path / name)
    (root / "train/red/a").symlink_to(tmp_path / "pool/2020")
    (root / "train/red/b").symlink_to(tmp_path / "pool")
    assert len(data.load("folder", root, 16).train[1]) == 122


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_among_the_images(colors, tmp_path):
    root = shutil.copytree(colors, tmp_path / "photos")
    os.mkfifo(root / "train/red/pipe.png")
    with pytest.raises(UserError, match="pipe.png: not a readable image"):
        data.load("folder", root, 16)


@pytest.mark.parametrize("name, measured", [("folder", "test"), ("imagenet", "val")])
def test_which_part_is_measured_where_there_are_three(colors, tmp_path, monkeypatch, name,
                                                      measured):
    root = shutil.copytree(colors, tmp_path / "three")
    shutil.copytree(root / "val", root / "test")
    (root / "test/red/0.png").unlink()
    three = data.DATASETS["imagenet"]._replace(classes=3)
    monkeypatch.setitem(data.DATASETS, "imagenet", three)
    assert len(data.load(name, root, 16).test[1]) == (59 if measured == "test" else 60)


@pytest.mark.parametrize("name, val, held_out", [
    ("folder", "val", False), ("folder", "valid", False), ("cifar10", "val", False),
    ("imagenet", "val", True), ("folder", None, True)])
def test_val_beside_test_is_for_evaluate_val(colors, tmp_path, monkeypatch, name, val, held_out):
    root = shutil.copytree(colors, tmp_path / "three")
    (root / "val").rename(root / "test")
    for k in range(7 if val else 0):
        (root / val / "red").mkdir(parents=True, exist_ok=True)
        shutil.copy(root / f"test/red/{k}.png", root / val / "red")
    monkeypatch.setitem(data.DATASETS, name, data.DATASETS[name]._replace(classes=3, side=16))
    size = 16 if name != "cifar10" else None
    test, measured = (data.load(name, root, size, evaluate=part) for part in ("test", "val"))
    assert len(test.test[1]) == (7 if name == "imagenet" else 60) and len(test.train[1]) == 120
    assert (len(measured.train[1]), len(measured.test[1])) == ((108, 12) if held_out else (120, 7))
    # A teacher that was trained on all training images is no teacher for a tenth of them.
    s = train.resolve(train.Settings(dataset=name, data_dir=str(root), evaluate="val"))
    mine = dict(pretrained=None, epochs=1)
    folders = [str(runs.teacher_folder(s, part, mine)) for part in (test, measured)]
    assert ("-val" in folders[1]) == held_out == (folders[0] != folders[1])


def test_what_systems_leave_behind_is_no_data(colors, tmp_path, capsys):
    """Jupyter's copies, macOS's second files, a Synology's thumbnails."""
    root = shutil.copytree(colors, tmp_path / "photos")
    image = root / "train/red/0.png"
    for place in ("train/.ipynb_checkpoints", "val/.ipynb_checkpoints", "train/__MACOSX",
                  "train/red/.ipynb_checkpoints", "train/red/@eaDir/0.png"):
        (root / place).mkdir(parents=True)
        shutil.copy(image, root / place / "0-checkpoint.png")
    for name in ("._0.png", ".hidden.png", ".DS_Store", "Thumbs.db"):
        (root / "train/red" / name).write_bytes(b"no image")
    loaded = data.load("folder", root, 14)
    assert loaded.classes == ["blue", "green", "red"] and "left out" not in capsys.readouterr().out
    assert loaded.digests == data.load("folder", colors, 14).digests


def test_files_that_pillow_does_not_read_are_counted(colors, tmp_path, monkeypatch, command):
    monkeypatch.setattr(photographs, "_endings", lambda: (".png", ".jpg"))
    root = shutil.copytree(colors, tmp_path / "photos")
    for name in ("train/red/1.HEIC", "val/red/2.heic", "train/red/a.NEF", "train/red/b.cr2",
                 "train/blue/c.avif", "train/blue/notes.txt"):
        (root / name).write_bytes(b"x")
    flags = "--dataset", "folder", "--data-dir", root, "--image-size", 16, "--device", "cpu"
    status, out, err = command(train, *flags, "--method", "ce", "--epochs", 1, "--run-dir", "run")
    line, = [line for line in out.splitlines() if "left out" in line]
    assert status == 0 and line.startswith("note      left out, since Pillow does not read")
    for part in ("2 .heic", "1 .nef", "1 .cr2", "1 .avif", "1 .txt", "save as JPEG",
                 "pip install pillow-heif", "pip install -U pillow"):
        assert part in line
    status, _, err = command(evaluation, "run/last.pt", "--predict", root / "train/red/1.HEIC")
    assert status == 2 and "1.HEIC: not a readable image" in err
    assert "; mend or remove it, or pip install pillow-heif\n" in err
    for image in (root / "train/red").glob("*.png"):
        image.rename(image.with_suffix(".heic"))
    with pytest.raises(UserError, match="'red' has no image.* 41 .heic, .*; pip install pillow-he"):
        data.load("folder", root, 16)


def test_heic_is_read_where_its_package_is_installed(tmp_path, monkeypatch):
    def register_heif_opener():
        Image.register_extension("PNG", ".heic")
    monkeypatch.setattr(Image, "EXTENSION", dict(Image.EXTENSION))
    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(
        register_heif_opener=register_heif_opener))
    photographs._endings.cache_clear()
    assert ".heic" in photographs._endings()
    photographs._endings.cache_clear()


# --- One folder a class ---------------------------------------------------------------------------

def parts_of(root):
    """{what an image shows: its part}, of a folder that is split."""
    loaded = data.load("folder", root, 16)
    return {image.numpy().tobytes(): part for part, images in (
        ("train", centre(loaded.train[0], 16)), ("test", loaded.test[0])) for image in images}


def test_a_folder_of_classes_is_split(colors, tmp_path, capsys):
    root = shutil.copytree(colors / "train", tmp_path / "photos")
    before = parts_of(root)
    assert f"note      {root} has no train/ and test/: the test part is about a fifth" in (
        capsys.readouterr().out)
    loaded = data.load("folder", root, 16)
    assert loaded.classes == ["blue", "green", "red"]
    assert len(loaded.train[1]) + len(loaded.test[1]) == len(before) == 120
    for labels, least, most in ((loaded.train[1], 26, 38), (loaded.test[1], 2, 14)):
        assert (least <= labels.bincount(minlength=3)).all()
        assert (labels.bincount(minlength=3) <= most).all()
    # An image stays where it is when others come, or the folder moves.
    for name in ("red", "blue"):
        for image in (colors / "val" / name).iterdir():
            shutil.copy(image, root / name / f"new{image.name}")
    after = parts_of(root.rename(tmp_path / "moved"))
    assert len(after) == 160 and before.items() <= after.items()
    assert {after[image] for image in after.keys() - before.keys()} == {"train", "test"}


def test_eval_measures_the_part_that_was_split_off(colors, tmp_path, command):
    root = shutil.copytree(colors / "train", tmp_path / "photos")
    history = train.run(train.Settings(method="ce", dataset="folder", data_dir=str(root), epochs=2,
                                       image_size=16, student="resnet8", device="cpu"), "run")
    status, out, err = command(evaluation, "run/last.pt", "--json")
    assert status == 0 and json.loads(out)["top1"] == history[-1]["test_top1"]
    assert json.loads(out)["n"] == len(data.load("folder", root, 16).test[1])


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_small_classes_are_in_both_parts(tmp_path, n):
    root = write_images(tmp_path / "photos", {
        f"{k:02d}/{i}.png": Image.new("RGB", (4, 4)) for k in range(30) for i in range(n)})
    loaded = data.load("folder", root, 4)
    for labels in (loaded.train[1], loaded.test[1]):
        assert labels.bincount(minlength=30).min() == 1 or n > 2 and labels.bincount().min() >= 1


@pytest.mark.parametrize("files, culprit", [
    ("a/0 b/0 b/1", "class 'a' has one image"),
    ("train/a/0 train/b/0", r"give --data-dir {root}/train, which is then split"),
    ("Training/a/0 Training/b/0 Validation/a/0", "should hold train/<class>/"),
    # Without folders in them, as in a well-known competition.
    ("train/0 train/1 test/0 test/1", "train: has the classes []"),
    ("train/a/0 train/b/0 test/0", "test: holds no folder of a class"),
    ("cats/train/a/0 cats/test/a/0 dogs/train/a/0 dogs/test/a/0", "its folders hold parts"),
    ("a/0 a/1", "or <class>/ alone")])
def test_folders_that_are_no_classes_are_not_split(tmp_path, files, culprit):
    root = write_images(tmp_path / "photos", {
        f"{name}.png": Image.new("RGB", (4, 4)) for name in files.split()})
    with pytest.raises(UserError, match=re.escape(culprit.format(root=root))):
        data.load("folder", root, 4)


def test_parts_in_capitals_are_parts(tmp_path):
    root = write_images(tmp_path / "photos", {
        f"{part}/{name}/0.png": Image.new("RGB", (4, 4)) for part in ("Train", "TEST")
        for name in "ab"})
    loaded = data.load("folder", root, 4)
    assert (len(loaded.train[1]), len(loaded.test[1])) == (2, 2)


def test_a_class_that_is_not_measured_is_said(tmp_path, capsys):
    classes = [f"{k}" for k in range(6)]
    for absent, words in (("3", "no image of 3\n"), ("12345", "no image of 1, 2, 3 and 2 more\n")):
        root = write_images(tmp_path / absent, {
            f"{part}/{name}/0.png": Image.new("RGB", (4, 4)) for part in ("train", "test")
            for name in classes if part == "train" or name not in absent})
        data.load("folder", root, 4)
        assert f"test has {words}" in capsys.readouterr().out


def test_one_folder_too_deep_is_said(tmp_path, capsys):
    root = write_images(tmp_path / "photos", {
        f"{part}/{name}/{i}.png": Image.new("RGB", (4, 4)) for part in ("train", "test")
        for name in "ab" for i in range(5)})
    data.load("folder", root / "train", 4)
    assert f"; for all of {root} give that" in capsys.readouterr().out
    with pytest.raises(UserError, match=re.escape(f"give the folder above it: --data-dir {root}")):
        data.load("folder", root / "train" / "a", 4)


@pytest.mark.parametrize("path, looks", [
    ("a/0.png", True), ("train/a/0.png", True), ("set/train/a/0.png", False), ("0.png", False),
    ("a/notes.txt", False)])
def test_folders_of_images_want_their_own_data_set(tmp_path, path, looks):
    (tmp_path / "photos" / path).parent.mkdir(parents=True)
    (tmp_path / "photos" / path).write_bytes(b"")
    settings = train.Settings(data_dir=str(tmp_path / "photos"))
    if looks:
        with pytest.raises(UserError, match="photos: holds folders of images; give --dataset fol"):
            train.resolve(settings)
    else:
        train.resolve(settings)


def test_trains_among_vehicles_are_a_class(tmp_path):
    root = write_images(tmp_path / "photos", {
        f"{name}/{i}.png": Image.new("RGB", (4, 4)) for name in ("bus", "train") for i in range(4)})
    assert data.load("folder", root, 4).classes == ["bus", "train"]


def test_a_folder_read_as_two_data_sets_keeps_its_labels(tmp_path):
    """At sizes that are stored alike, in another order."""
    for part in ("train", "test"):
        for k in range(10):
            (tmp_path / f"set/{part}/{k}").mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (32, 32), (k, i, 0)).save(tmp_path / f"set/{part}/{k}/{i}.png")
    for name, size in (("folder", 28), ("cifar10", 32), ("folder", 28)):
        images, labels = data.load(name, tmp_path / "set", size).train
        assert torch.equal(images[:, 0, 5, 5].long(), labels), name


@pytest.mark.parametrize("name, image", [
    ("float.tif", Image.fromarray(np.full((9, 9), 0.5, np.float32))),
    ("deep.tif", Image.fromarray(np.full((9, 9), 4095, np.uint16))),
    ("deeper.tif", Image.fromarray(np.full((9, 9), 4095, np.int32)))])
def test_an_image_of_unknown_range_is_refused(tmp_path, name, image):
    image.save(tmp_path / name)
    with pytest.raises(UserError, match=f"{name}.*range of brightness is not known"):
        photographs.read_image(str(tmp_path / name), 8)


def test_what_is_under_a_transparent_pixel_stays_hidden(tmp_path):
    half = Image.new("P", (8, 8), 1)
    half.putpalette([9, 9, 9, 200, 0, 0])
    half.save(tmp_path / "p.png", transparency=1)
    Image.new("RGBA", (8, 8), (200, 0, 0, 0)).save(tmp_path / "rgba.png")
    Image.new("LA", (8, 8), (7, 0)).save(tmp_path / "la.png")
    for path in tmp_path.glob("*.png"):
        assert (photographs.read_image(str(path), 8) == 255).all(), path


def test_damaged_exif_is_refused_or_read(tmp_path):
    """A TIFF header whose directory points beyond its end, and one of a wrong type."""
    for name, block in (("beyond", b"Exif\0\0MM\0*\xff\xff\xff\xff"),
                        ("type", b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + struct.pack(
                            ">HHI4s", 274, 2, 2, b"\xff\xff\0\0"))):
        path = tmp_path / f"{name}.jpg"
        Image.new("RGB", (8, 8)).save(path, exif=block)
        try:
            assert photographs.read_image(str(path), 8).shape == (3, 8, 8)
        except UserError as error:
            assert path.name in str(error)


@pytest.mark.parametrize("ending", ["avif", "dds", "jp2", "tif", "webp", "gif", "png", "jpg", "bmp",
                                    "ico", "tga", "ppm"])
def test_damaged_images_are_refused_or_read(tmp_path, ending):
    g, path = np.random.default_rng(0), tmp_path / f"x.{ending}"
    try:
        Image.fromarray(g.integers(0, 256, (20, 30, 3), np.uint8)).save(path)
    except (OSError, ValueError, KeyError):
        pytest.skip(f"this Pillow writes no {ending}")
    whole = path.read_bytes()
    for k in range(60):
        content = bytearray(whole)
        if k % 2:
            del content[g.integers(len(content)):]
        else:
            content[g.integers(min(len(content), 200))] ^= 1 << g.integers(8)
        path.write_bytes(content)
        try:
            image = photographs.read_image(str(path), 8)
            assert image.shape == (3, 8, 8) and image.dtype == np.uint8
        except UserError as error:
            assert path.name in str(error) and "\n" not in str(error)


def test_the_next_photographs_are_fetched_while_these_are_used():
    fetched = [threading.Event() for _ in range(3)]

    def fetch(k):
        fetched[k].set()
        return k
    ahead = photographs.one_ahead(fetch, range(3))
    assert next(ahead) == 0 and fetched[1].wait(10)
    assert list(ahead) == [1, 2]


@pytest.mark.parametrize("end", ["the consumer stops", "an image cannot be fetched", "all is read"])
def test_no_thread_is_left(end):
    before = threading.active_count()
    ahead = photographs.one_ahead(lambda k: 6 / k, [3, 2, 0] if "cannot" in end else [3, 2, 1])
    assert next(ahead) == 2 and threading.active_count() == before + 1
    if end == "the consumer stops":
        ahead.close()
    elif end == "all is read":
        assert list(ahead) == [3, 6]
    else:
        with pytest.raises(ZeroDivisionError):
            list(ahead)
    assert threading.active_count() == before


def test_fetching_ahead_changes_no_number(colors, monkeypatch):
    loaded, asked = data.load("folder", colors, 100), []
    epoch = [(*views, target) for views, target in data.batches(loaded, 60, "both", 0, 1)]

    def one_by_one(function, arguments):
        asked.extend(arguments)
        return map(function, arguments)
    monkeypatch.setattr(photographs, "one_ahead", one_by_one)
    for views, target in data.batches(loaded, 60, "both", 0, 1):
        assert all(map(torch.equal, epoch.pop(0), (*views, target)))
    # On a CPU fewer are made at once than stand in a batch.
    assert not epoch and [at.stop - at.start for at in asked] == [52, 8, 52, 8]
