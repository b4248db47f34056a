"""Bad input ends with exit status 2 and one line that names the culprit; nothing saved is lost.

Input that is odd but not wrong works as one would expect.
"""
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import eval as evaluation
import train
from models import create_model
from support.checkpoints import load_model
from support.errors import UserError

FLAGS = [
    ("--methd sld", "--methd"), ("--method mlld", "mlld"), ("--student resnet9", "resnet9"),
    ("--teacher vgg12", "--teacher vgg12: unknown network; nearest: vgg1"),
    ("--student mobilenet_v4_small", "nearest: mobilenet_v3_small"),
    ("--student inception_v3", "inception_v3: returns more than logits"),
    ("--teacher googlenet", "googlenet: returns more than logits"),
    ("--student fcn_resnet50", "fcn_resnet50: unknown"), ("--student ???", "???: unknown"),
    ("--pretrained", "--pretrained: there are no weights for resnet8, resnet14"),
    ("--student vit_b_16 --dataset folder --image-size 64", "--image-size 64: vit_b_16"),
    ("--student vgg11", "--image-size 16: vgg11"),
    ("--dataset imagenette", "imagenette"), ("--epochs 0", "--epochs 0"),
    ("--epochs -3", "--epochs -3"), ("--epochs two", "two"), ("--batch-size 0", "--batch-size 0"),
    ("--batch-size -1", "--batch-size -1"), ("--lr 0", "--lr 0"), ("--lr -0.1", "--lr -0.1"),
    ("--lr nan", "--lr nan"), ("--lr inf", "--lr inf"), ("--temperatures 0", "--temperatures 0"),
    ("--temperatures 4 -1", "--temperatures -1"),
    ("--temperatures", "--temperatures"), ("--weight-decay -1", "--weight-decay"),
    ("--kd-weight -1", "--kd-weight"), ("--ce-weight nan", "--ce-weight"),
    ("--gamma 9", "--gamma 9"), ("--gamma -1", "--gamma -1"),
    ("--gamma 3 --no-student-swap", "--gamma"), ("--omega 2", "--omega"),
    ("--teacher-fix add", "--omega"), ("--teacher-fix add-wrong", "--omega"),
    ("--teacher-fix sort --omega 1", "--omega"), ("--method mlkd --teacher-fix sort",
                                                  "--teacher-fix: no part of --method mlkd"),
    ("--teacher-fix swop", "swop"),
    ("--method kd --gamma 3", "--gamma"), ("--method ce --teacher resnet20", "--teacher"),
    ("--method ce --temperatures 4", "--temperatures"),
    ("--method kd --teacher-fix swap", "--teacher-fix"), ("--seed -1", "--seed"),
    ("--image-size 64", "--image-size 64"), ("--image-size 0 --dataset folder", "--image-size 0"),
    ("--device cuda", "--device cuda"),
    ("--student vit_nano --dataset folder --image-size 30", "--image-size 30"),
    ("--resume", "--run-dir"), ("--resume --run-dir nothing", "nothing"),
    ("--dataset folder --data-dir nowhere", "nowhere"),
    ("--teacher-checkpoint missing.pt", "missing.pt"), ("--views strong", "strong"),
    ("--optimizer adam", "adam"), ("extra", "extra"), ("--temperatures nan", "--temperatures nan"),
    ("--temperatures inf", "--temperatures inf"),
    ("--epochs 1e3", "1e3"), ("--epochs 2.5", "2.5"), ("--seed 4294967296", "--seed 4294967296"),
    ("--lr 1e400", "--lr inf"), ("--warmup 9", "--warmup 9"),
    ("--warmup -1", "--warmup"), ("--weight-decay inf", "--weight-decay"),
    ("--omega nan --teacher-fix add", "--omega nan"), ("--schedule linear", "linear"),
    ("--batch-size 481", "--batch-size 481"), ("--teacher-checkpoint .", "."),
    ("--run-dir .", "--run-dir ."), ("--image-size -5 --dataset folder", "--image-size -5"),
    ("--device tpu", "tpu"), ("--data-dir FILE --dataset folder", "FILE"),
    ("--run-dir FILE/run --method ce", "FILE"),
]


def refused(result, culprit):
    status, out, err = result
    assert status == 2, (status, out, err)
    assert culprit in err and err.count("\n") == 1 and "Traceback" not in err, err


@pytest.mark.parametrize("arguments, culprit", FLAGS, ids=[a for a, _ in FLAGS])
def test_flags(command, easy_glyphs, arguments, culprit):
    if culprit == "--device cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    data_dir = () if "--data-dir" in arguments else ("--data-dir", easy_glyphs)
    Path("FILE").write_text("not a folder")
    refused(command(train, *data_dir, *arguments.split()), culprit)


BAD_FILES = {"empty": b"", "html": b"<!DOCTYPE html><html><body>404</body></html>",
             "text": b"hello\n", "noise": bytes(range(256)) * 20}


@pytest.mark.parametrize("kind", [
    *BAD_FILES, "truncated", "tensor", "no classifier", "other network", "wrong shapes",
    "directory", "NaN weights", "infinite statistics", "numbers as names", "text as weights",
    "unknown architecture", "strange image size"])
def test_checkpoints(command, base, colors, color_teacher, tmp_path, kind):
    path = tmp_path / "bad.pt"
    if kind in BAD_FILES:
        path.write_bytes(BAD_FILES[kind])
    elif kind == "truncated":
        path.write_bytes(color_teacher.read_bytes()[:20_000])
    elif kind == "directory":
        path.mkdir()
    else:
        state = create_model("resnet14" if kind == "other network" else "resnet8", 3).state_dict()
        vit = create_model("vit_nano", 3).state_dict()
        wrong = {
            "tensor": torch.zeros(3), "no classifier": {"weights": torch.zeros(3)},
            "other network": state,
            "wrong shapes": state | {"conv1.weight": torch.zeros(4, 3, 3, 3)},
            "NaN weights": state | {"conv1.weight": state["conv1.weight"] * float("nan")},
            "infinite statistics": state | {"bn1.running_var": torch.full((16,), float("inf"))},
            "numbers as names": {0: torch.zeros(3), 1: torch.ones(2)},
            "text as weights": state | {"conv1.weight": "hello"},
            "unknown architecture": {"architecture": "resnet9", "model": state},
            "strange image size": {"architecture": "vit_nano", "image_size": "big", "model": vit}}
        torch.save(wrong[kind], path)
    refused(command(train, *base, "--teacher-checkpoint", path), "bad.pt")
    flags = ("--model", "resnet8", "--dataset", "folder", "--data-dir", colors)
    refused(command(evaluation, path, *flags), "bad.pt")
    assert not (tmp_path / "run").exists()


def test_class_counts_are_both_named(command, base, colors, tmp_path):
    path = tmp_path / "seven.pt"
    torch.save(create_model("resnet8", 7).state_dict(), path)
    flags = ("--model", "resnet8", "--dataset", "folder", "--data-dir", colors)
    for result in (command(train, *base, "--teacher-checkpoint", path),
                   command(evaluation, path, *flags)):
        refused(result, "seven.pt")
        assert "7 classes" in result[2] and " 3" in result[2]


def test_a_teacher_at_chance_is_refused(command, base, tmp_path):
    model = create_model("resnet8", 3)
    torch.nn.init.zeros_(model.fc.weight)
    torch.save(model.state_dict(), tmp_path / "fresh.pt")
    refused(command(train, *base, "--teacher-checkpoint", tmp_path / "fresh.pt"),
            "no better than 43.33 %, near chance; give another")


def break_folder(root, kind):
    """Damage a copy of the colour folder. Returns what the message must name."""
    red = root / "train/red"
    if kind == "empty class":
        (root / "train/violet").mkdir()
        return "violet"
    if kind == "damaged image":
        (red / "7.png").write_bytes((red / "7.png").read_bytes()[:60])
        return "7.png"
    if kind == "zero-byte image":
        (root / "val/red/3.png").write_bytes(b"")
        return "3.png"
    if kind == "text as image":
        (red / "notes.png").write_text("hello")
        return "notes.png"
    if kind == "broken link":
        (red / "gone.png").symlink_to("nowhere.png")
        return "gone.png"
    if kind == "no val":
        shutil.rmtree(root / "val")
        return "val/<class>/"
    if kind == "no train":
        shutil.rmtree(root / "train")
        return "train/<class>/"
    if kind == "one class":
        shutil.rmtree(root / "train/green")
        shutil.rmtree(root / "train/blue")
        return "'red'"
    if kind == "no permission":
        red.chmod(0)
        return "red"
    if kind == "class only in val":
        (root / "val/yellow").mkdir()
        Image.new("RGB", (16, 16)).save(root / "val/yellow/0.png")
        return "yellow"


@pytest.mark.parametrize("kind", [
    "empty class", "damaged image", "zero-byte image", "text as image", "broken link", "no val",
    "no train", "one class", "class only in val", "no permission"])
def test_folders(command, base, colors, tmp_path, kind):
    root = tmp_path / "copy"
    shutil.copytree(colors, root)
    culprit = break_folder(root, kind)
    if kind == "no permission" and os.access(root / "train/red", os.R_OK):
        pytest.skip("permissions do not bind this user")
    result = command(train, *base, "--data-dir", root)
    if kind == "no permission":
        (root / "train/red").chmod(0o755)
    refused(result, culprit)
    assert not (tmp_path / "run").exists()


def test_images_that_do_not_fit_on_the_disk(command, base):
    result = command(train, *base, "--image-size", 100_000)
    refused(result, "4702064326560 bytes (4379.1 GiB)")
    assert "--image-size" in result[2] and "bytes are free" in result[2]


def test_an_archive_instead_of_a_folder(command, base, colors):
    archive = shutil.make_archive("photos", "zip", colors)
    refused(command(train, *base, "--data-dir", archive), "photos.zip: a file, not a folder")


def test_imagenet_with_other_than_its_classes(command, colors, tmp_path):
    for script in (train, evaluation):
        about = () if script is train else (tmp_path / "x.pt", "--model", "resnet8")
        torch.save(create_model("resnet8", 3).state_dict(), tmp_path / "x.pt")
        refused(command(script, *about, "--dataset", "imagenet", "--data-dir", colors),
                "3 classes in train/, where imagenet has 1000")


def test_one_image_left_for_batch_norm(command, base):
    """Three pixels end as one, which alone has no variance."""
    refused(command(train, *base, "--image-size", 3, "--batch-size", 119), "--batch-size 119")


def test_a_batch_larger_than_the_data(command, base, color_teacher):
    refused(command(train, *base, "--batch-size", 500, "--teacher-checkpoint", color_teacher),
            "--batch-size 500")


def test_wrong_class_count_for_cifar(command, colors):
    shutil.copytree(colors, "cifar")
    shutil.move("cifar/val", "cifar/test")
    refused(command(train, "--dataset", "cifar10", "--data-dir", "cifar"), "3 classes")


def unusual_folder(root, kind):
    """Change a copy of the colour folder in a way that is no mistake."""
    red, image = root / "train/red", Image.open(root / "train/red/0.png")
    if kind == "animated":
        more = [Image.new("RGB", (16, 16), k) for k in ("white", "black")]
        image.save(red / "moving.gif", save_all=True, append_images=more)
    elif kind in ("L", "RGBA", "LA", "P", "1", "CMYK", "I;16"):
        converted = Image.new("I;16", (16, 16), 40_000) if kind == "I;16" else image.convert(kind)
        converted.save(red / ("other.tif" if kind in ("CMYK", "LA") else "other.png"))
    elif kind == "one image in a class":
        for path in list((root / "train/green").iterdir())[1:]:
            path.unlink()
    elif kind == "notes beside the images":
        (red / "notes.txt").write_text("taken in May")
        (red / ".DS_Store").write_bytes(b"\0")
    elif kind == "name that is not UTF-8":
        try:
            os.rename(os.fsencode(red), os.fsencode(root / "train") + b"/caf\xe9")
            os.rename(os.fsencode(root / "val/red"), os.fsencode(root / "val") + b"/caf\xe9")
        except OSError:
            # macOS knows no such names.
            pytest.skip("the file system refuses the name")
    elif kind == "spaces and accents":
        red.rename(root / "train/très rouge")
        (root / "val/red").rename(root / "val/très rouge")
    elif kind == "fewer classes in val":
        shutil.rmtree(root / "val/blue")
    elif kind == "thin images":
        Image.new("RGB", (1, 300), "red").save(red / "thin.png")
    elif kind == "one huge and one tiny image":
        Image.new("RGB", (6000, 4000), "red").save(red / "huge.jpg")
        Image.new("RGB", (1, 1), "red").save(red / "tiny.png")
    elif kind == "folders in folders":
        (red / "more").mkdir()
        shutil.move(red / "3.png", red / "more/3.png")
    elif kind == "images linked from elsewhere":
        shutil.move(red / "3.png", root / "kept.png")
        (red / "3.png").symlink_to(root / "kept.png")


@pytest.mark.parametrize("kind", [
    "animated", "L", "RGBA", "LA", "P", "1", "CMYK", "I;16", "one image in a class",
    "notes beside the images", "name that is not UTF-8", "spaces and accents",
    "fewer classes in val", "thin images", "one huge and one tiny image", "folders in folders",
    "images linked from elsewhere"])
def test_unusual_folders_work(command, colors, tmp_path, kind):
    root = tmp_path / "my photos"
    shutil.copytree(colors, root)
    unusual_folder(root, kind)
    status, out, err = command(train, "--method", "ce", "--dataset", "folder", "--data-dir", root,
                               "--image-size", 16, "--epochs", 1, "--device", "cpu", "--run-dir",
                               "run")
    assert status == 0, err
    status, out, err = command(evaluation, "run/last.pt")
    assert status == 0 and "top1" in out, err


@pytest.mark.parametrize("arguments", [
    ("--batch-size", 1), ("--batch-size", 119), ("--batch-size", 120),
    ("--image-size", 1), ("--image-size", 3), ("--image-size", 37)])
def test_unusual_sizes_work(command, base, colors, color_teacher, arguments):
    # As a file that does not say its size. On another one it may be at chance.
    torch.save(torch.load(color_teacher, weights_only=True)["model"], "bare.pt")
    status, out, err = command(train, *base, "--teacher-checkpoint", "bare.pt", "--epochs", 1,
                               *arguments)
    assert status == 0 or "no better than" in err, err


def test_no_damage_to_a_checkpoint_gets_past_the_door(color_teacher, tmp_path):
    """Bytes changed, cut out or doubled at random: loaded with finite weights, or refused."""
    whole, luck, refusals = color_teacher.read_bytes(), random.Random(0), 0
    for k in range(150):
        at = luck.randrange(len(whole)) if k % 2 else luck.randrange(3000)
        length = luck.choice((1, 4, 100, 5000))
        middle = {0: luck.randbytes(length), 1: b"", 2: whole[at:at + length] * 2}[k % 3]
        (tmp_path / "bad.pt").write_bytes(whole[:at] + middle + whole[at + length:])
        try:
            model, _ = load_model(tmp_path / "bad.pt")
            assert all(value.isfinite().all() for value in model.state_dict().values())
        except UserError as error:
            refusals += 1
            assert "bad.pt" in str(error) and "\n" not in str(error)
    assert refusals > 50


@pytest.mark.parametrize("name, content, culprit", [
    ("config.json", "{", "no run"), ("config.json", "[]", "no run"),
    ("config.json", '{"method": "sld", "temperature": 3}', "no run"),
    ("last.pt", "", "last.pt"), ("last.pt", "PK", "last.pt")])
def test_a_damaged_run_is_not_resumed(trained, command, name, content, culprit):
    (trained / name).write_text(content)
    refused(command(train, "--resume", "--run-dir", "run"), culprit)


def test_a_foreign_file_in_the_place_of_the_checkpoint(trained, command):
    shutil.copy(trained / "best.pt", trained / "last.pt")
    refused(command(train, "--resume", "--run-dir", "run"), "last.pt")


@pytest.mark.parametrize("content", ["", "{", "[1, 2]\n", '{"epoch": 1}\n'])
def test_a_table_of_damaged_logs(trained, command, tmp_path, content):
    (trained / "metrics.jsonl").write_text(content)
    refused(command(evaluation, "--table", tmp_path), "run")


def test_data_that_went_away(trained, command):
    shutil.rmtree("photos")
    refused(command(evaluation, "run/last.pt"), "--data-dir photos: no such folder")
    refused(command(train, "--resume", "--run-dir", "run"), "--data-dir photos: no such folder")


def test_a_run_is_never_written_over(trained, command, base, color_teacher):
    arguments = (*base, "--teacher-checkpoint", color_teacher)
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    refused(command(train, *arguments), "run: already holds a run")
    changed = ("--resume", "--run-dir", "run", "--lr", 0.3, "--seed", 4)
    refused(command(train, *changed), "leave out --lr, --seed")
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before
    # Also where they are the run's own.
    refused(command(train, "--resume", *arguments), "leave out --dataset, --student, --teacher, ")
    assert command(train, "--resume", "--run-dir", "run", "--device", "cpu")[0] == 0


@pytest.mark.parametrize("arguments, culprit", [
    ("", "CHECKPOINT"), ("missing.pt", "missing.pt"), ("--table nowhere", "nowhere"),
    ("x.pt --table y", "CHECKPOINT"), ("x.pt --modle resnet8", "--modle"),
    ("x.pt --model resnet9", "--model resnet9: unknown network; nearest: resnet8"),
    ("x.pt --teacher-checkpoint y.pt --teacher googlenet", "--teacher googlenet"),
    ("resnet35", "resnet35: no such checkpoint"), ("--predict a.jpg", "--predict"),
    ("x.pt --device tpu", "tpu"), ("x.pt --device mps", "--device mps")])
def test_eval_flags(command, arguments, culprit):
    if "mps" in arguments and torch.backends.mps.is_available():
        pytest.skip("there is such a GPU here")
    refused(command(evaluation, *arguments.split()), culprit)


def test_eval_of_a_foreign_file_asks_for_what_is_missing(command, tmp_path, colors):
    torch.save(create_model("resnet8", 3).state_dict(), tmp_path / "bare.pt")
    refused(command(evaluation, "bare.pt"), "--model")
    refused(command(evaluation, "bare.pt", "--model", "resnet8"), "--dataset")


def test_a_checkpoint_of_another_run_is_not_resumed(trained, command, base, color_teacher):
    assert command(train, *base, "--teacher-checkpoint", color_teacher, "--data-dir", "photos",
                   "--seed", 1, "--run-dir", "other")[0] == 0
    shutil.copy("other/last.pt", "run/last.pt")
    refused(command(train, "--resume", "--run-dir", "run"), "last.pt is not a checkpoint of this")


def test_a_run_without_its_checkpoint_is_not_started_over(trained, command):
    os.remove("run/last.pt")
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    refused(command(train, "--resume", "--run-dir", "run"), "last.pt is gone")
    assert {path.name: path.read_bytes() for path in Path("run").iterdir()} == before


def test_a_users_own_tmp_file_is_not_touched(command, base, color_teacher):
    Path("run").mkdir()
    Path("run/thesis.tmp").write_text("mine")
    refused(command(train, *base, "--teacher-checkpoint", color_teacher), "run: already holds")
    Path("run/thesis.tmp").unlink()
    Path("run/last.pt.123.tmp").write_text("torn")
    assert command(train, *base, "--teacher-checkpoint", color_teacher)[0] == 0
    assert not list(Path("run").glob("*.tmp"))
