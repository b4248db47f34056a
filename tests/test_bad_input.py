"""Bad input ends with exit status 2 and one line that names the culprit; nothing saved is lost."""
import shutil

import pytest
import torch
from PIL import Image

import eval as evaluation
import train
from models import create_model

FLAGS = [
    ("--methd sld", "--methd"), ("--method mlkd", "mlkd"), ("--student resnet9", "resnet9"), ("--teacher vgg13", "vgg13"),
    ("--dataset imagenet", "imagenet"), ("--epochs 0", "--epochs 0"), ("--epochs -3", "--epochs -3"), ("--epochs two", "two"),
    ("--batch-size 0", "--batch-size 0"), ("--batch-size -1", "--batch-size -1"), ("--lr 0", "--lr 0"), ("--lr -0.1", "--lr -0.1"),
    ("--lr nan", "--lr nan"), ("--lr inf", "--lr inf"), ("--temperatures 0", "--temperatures 0"), ("--temperatures 4 -1", "--temperatures -1"),
    ("--temperatures", "--temperatures"), ("--weight-decay -1", "--weight-decay"), ("--kd-weight -1", "--kd-weight"), ("--ce-weight nan", "--ce-weight"),
    ("--gamma 8", "--gamma 8"), ("--gamma -1", "--gamma -1"), ("--gamma 3 --no-student-swap", "--gamma"), ("--omega 2", "--omega"),
    ("--teacher-fix add", "--omega"), ("--teacher-fix swop", "swop"), ("--method kd --gamma 3", "--gamma"), ("--method ce --teacher resnet20", "--teacher"),
    ("--method ce --temperatures 4", "--temperatures"), ("--method kd --teacher-fix swap", "--teacher-fix"), ("--seed -1", "--seed"),
    ("--image-size 64", "--image-size 64"), ("--image-size 0 --dataset folder", "--image-size 0"), ("--device cuda", "--device cuda"),
    ("--student vit_nano --dataset folder --image-size 30", "--image-size 30"), ("--resume", "--run-dir"), ("--resume --run-dir nothing", "nothing"),
    ("--dataset folder --data-dir nowhere", "nowhere"), ("--teacher-checkpoint missing.pt", "missing.pt"), ("--views strong", "strong"),
    ("--optimizer adam", "adam"), ("extra", "extra"),
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
    refused(command(train, *data_dir, *arguments.split()), culprit)


@pytest.fixture
def base(colors):
    return ("--dataset", "folder", "--data-dir", colors, "--image-size", 16, "--student", "resnet8", "--teacher", "resnet8",
            "--device", "cpu", "--epochs", 2, "--batch-size", 32, "--run-dir", "run")


BAD_FILES = {
    "empty": b"", "html": b"<!DOCTYPE html><html><body>404</body></html>", "text": b"hello\n", "noise": bytes(range(256)) * 20,
}


@pytest.mark.parametrize("kind", [*BAD_FILES, "truncated", "tensor", "no classifier", "other network", "wrong shapes", "directory"])
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
        wrong = {"tensor": torch.zeros(3), "no classifier": {"weights": torch.zeros(3)}, "other network": state,
                 "wrong shapes": state | {"conv1.weight": torch.zeros(4, 3, 3, 3)}}
        torch.save(wrong[kind], path)
    refused(command(train, *base, "--teacher-checkpoint", path), "bad.pt")
    refused(command(evaluation, path, "--model", "resnet8", "--dataset", "folder", "--data-dir", colors), "bad.pt")
    assert not (tmp_path / "run").exists()


def test_class_counts_are_both_named(command, base, colors, tmp_path):
    torch.save(create_model("resnet8", 7).state_dict(), tmp_path / "seven.pt")
    for result in (command(train, *base, "--teacher-checkpoint", tmp_path / "seven.pt"),
                   command(evaluation, tmp_path / "seven.pt", "--model", "resnet8", "--dataset", "folder", "--data-dir", colors)):
        refused(result, "seven.pt")
        assert "7 classes" in result[2] and " 3" in result[2]


def test_a_teacher_at_chance_is_refused(command, base, tmp_path):
    model = create_model("resnet8", 3)
    torch.nn.init.zeros_(model.fc.weight)
    torch.save(model.state_dict(), tmp_path / "fresh.pt")
    refused(command(train, *base, "--teacher-checkpoint", tmp_path / "fresh.pt"), "no better than 43.33 % (ten points above chance)")


def break_folder(root, kind):
    """Damage a copy of the colour folder; returns what the message must name."""
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
    if kind == "class only in val":
        Image.new("RGB", (16, 16)).save((root / "val/yellow").mkdir() or root / "val/yellow/0.png")
        return "yellow"


@pytest.mark.parametrize("kind", ["empty class", "damaged image", "zero-byte image", "text as image", "broken link", "no val", "no train",
                                  "one class", "class only in val"])
def test_folders(command, base, colors, tmp_path, kind):
    root = tmp_path / "copy"
    shutil.copytree(colors, root)
    culprit = break_folder(root, kind)
    refused(command(train, *base, "--data-dir", root), culprit)
    assert not (tmp_path / "run").exists()


def test_images_that_do_not_fit_in_memory(command, base):
    result = command(train, *base, "--image-size", 100_000)
    refused(result, "--image-size 100000")
    assert "GiB" in result[2]


def test_a_batch_larger_than_the_data(command, base, color_teacher):
    refused(command(train, *base, "--batch-size", 500, "--teacher-checkpoint", color_teacher), "--batch-size 500")


def test_wrong_class_count_for_cifar(command, colors):
    refused(command(train, "--dataset", "cifar10", "--data-dir", shutil.copytree(colors, "cifar") and _with_test("cifar")), "3 classes")


def _with_test(root):
    shutil.move(f"{root}/val", f"{root}/test")
    return root


def test_a_run_is_never_written_over(command, base, color_teacher, tmp_path):
    arguments = (*base, "--teacher-checkpoint", color_teacher)
    assert command(train, *arguments)[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    refused(command(train, *arguments), "run: already holds a run")
    refused(command(train, "--resume", "--run-dir", "run", "--lr", 0.3, "--seed", 4), "--seed 0 -> 4")
    assert "--lr 0.025 -> 0.3" in command(train, "--resume", "--run-dir", "run", "--lr", 0.3, "--seed", 4)[2]
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    assert command(train, "--resume", *arguments)[0] == 0


@pytest.mark.parametrize("arguments, culprit", [
    ("", "CHECKPOINT"), ("missing.pt", "missing.pt"), ("--table nowhere", "nowhere"), ("x.pt --table y", "CHECKPOINT"), ("x.pt --modle resnet8", "--modle"),
    ("x.pt --model resnet9", "resnet9")])
def test_eval_flags(command, arguments, culprit):
    refused(command(evaluation, *arguments.split()), culprit)


def test_eval_of_a_foreign_file_asks_for_what_is_missing(command, tmp_path, colors):
    torch.save(create_model("resnet8", 3).state_dict(), tmp_path / "bare.pt")
    refused(command(evaluation, "bare.pt"), "--model")
    refused(command(evaluation, "bare.pt", "--model", "resnet8"), "--dataset")
