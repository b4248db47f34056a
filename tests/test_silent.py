"""Nothing wrong passes silently: what once gave a wrong number or a traceback is said in a line."""
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_bad_input import refused

import data
import eval as evaluation
import train
from eval import measure, predict
from models import create_model
from support import console, glyphs
from support.checkpoints import load_model
from support.errors import UserError


def top1_of(report):
    return float(report[1].split("top1")[1].split()[0])


@pytest.fixture
def other_statistics(color_teacher, tmp_path):
    """The teacher's weights in a file that says another mean and std."""
    checkpoint = torch.load(color_teacher, weights_only=True)
    path = tmp_path / "other.pt"
    torch.save(checkpoint | dict(mean=(0.1, 0.2, 0.7), std=(0.6, 0.3, 0.9)), path)
    return path


def test_each_network_sees_images_normalised_as_it_was_trained(
        colors, other_statistics, color_teacher, base, command):
    loaded = data.load("folder", colors, 16)
    (images, labels), (mean, std) = loaded.test, (loaded.mean, loaded.std)
    alone = predict(load_model(other_statistics)[0], images, (0.1, 0.2, 0.7), (0.6, 0.3, 0.9))
    fitted = predict(load_model(other_statistics, data=loaded)[0], images, mean, std)
    torch.testing.assert_close(fitted, alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(fitted, predict(load_model(color_teacher)[0], images, mean, std))
    # Train.py and both ways of eval.py give one number for it.
    top1 = measure(alone, labels)["top1"]
    assert top1_of(command(evaluation, other_statistics)) == pytest.approx(top1, abs=1e-4)
    status, out, err = command(train, *base, "--teacher-checkpoint", other_statistics, "--epochs",
                               1)
    assert status == 0 or "no better than" in err, err
    assert f"{top1:.2f} % test top-1" in out + err or f"has {top1:.2f} %" in err
    if status == 0:
        assert "[0.1, 0.2, 0.7]" in out and "not by the data's [[0.485, 0.456, 0.406]" in out
    status, out, err = command(evaluation, color_teacher, "--teacher-checkpoint", other_statistics,
                               "--json")
    assert json.loads(out)["teacher_errors"] == round(len(labels) * (1 - top1 / 100))


def test_a_mean_that_differs_by_a_few_pixels_is_the_same(colors, color_teacher, tmp_path, capsys):
    checkpoint, path = torch.load(color_teacher, weights_only=True), tmp_path / "other.pt"
    for off, said in ((1e-8, False), (1e-3, True)):
        torch.save(checkpoint | dict(mean=[m + off for m in checkpoint["mean"]]), path)
        load_model(path, data=data.load("folder", colors, 16))
        assert ("sees images normalised" in capsys.readouterr().out) == said


def test_a_network_is_not_measured_at_another_size(colors, color_teacher, command, base):
    refused(command(train, *base, "--image-size", 24, "--teacher-checkpoint", color_teacher),
            "a resnet8 for 16 px, the images have 24")
    refused(command(evaluation, color_teacher, "--image-size", 24), "for 16 px")


def test_a_network_whose_outputs_are_not_finite_is_refused(colors, color_teacher, base, command):
    """Its weights are: only the sums are too large, on some images."""
    saved = torch.load(color_teacher, weights_only=True)
    saved["model"]["fc.weight"] *= 1e38
    torch.save(saved, "large.pt")
    image = colors / "val/red/3.png"
    for result in (command(train, *base, "--teacher-checkpoint", "large.pt"),
                   command(evaluation, "large.pt"), command(evaluation, "large.pt", "--json"),
                   command(evaluation, color_teacher, "--teacher-checkpoint", "large.pt"),
                   command(evaluation, "large.pt", "--predict", image, image)):
        refused(result, "large.pt: the outputs on ")
        assert "images are not finite, first on number 1;" in result[2]
    assert not Path("run").exists()


@pytest.mark.parametrize("method", ["kd", "sld", "dkd", "rld"])
def test_a_teacher_that_fails_in_training_is_named_with_the_step(short, method):
    def wrap(teacher, digest, s):
        calls = []

        def fail_at_the_third_step(module, images, logits):
            calls.append(1)
            return logits * float("nan" if len(calls) == 3 else 1)
        teacher.register_forward_hook(fail_at_the_third_step)
        return teacher
    with pytest.raises(UserError, match=r"^epoch 1, step 3 of 4, lr [0-9.e-]+: the teacher's "
                                        "outputs are not finite; give another --teacher-check"):
        train.run(short(method=method, amp=False), "run", wrap_teacher=wrap)


def test_a_student_that_learns_nothing_is_said_once(short, monkeypatch, capsys):
    real = train.create_model

    def mute(*arguments):
        network = real(*arguments)
        torch.nn.init.zeros_(network.fc.weight)
        return network
    monkeypatch.setattr(train, "create_model", mute)
    # Four steps an epoch: only at the end, or from the 50th step on.
    for epochs, at in ((2, 2), (15, 13)):
        train.run(short(method="ce", lr=1e-12, epochs=epochs), f"run{epochs}")
        lines = capsys.readouterr().out.splitlines()
        where = [k for k, line in enumerate(lines) if line.startswith("warning   hardly better")]
        assert len(where) == 1 and lines[where[0] - 1].split()[0] == str(at)
        assert ("33.33 % test top-1, NLL 1.099; to know only how frequent each class is gives "
                f"33.33 % and 1.099; only {4 * epochs} steps in all; if it learns little, try "
                "--batch-size 16 --epochs 38") in lines[where[0]]
    # Not undo(), which would also leave this test's own folder.
    monkeypatch.setattr(train, "create_model", real)
    train.run(short(method="ce", epochs=2), "learns")
    assert "warning" not in capsys.readouterr().out


BALANCED, LOPSIDED = torch.arange(1000) % 4, (torch.arange(1000) % 10 == 0).long()


@pytest.mark.parametrize("labels, epoch, train_top1, test_top1, nll, warned", [
    (BALANCED, 5, 25.5, 25.0, 1.386, True), (BALANCED, 5, 24.0, 26.0, 170_280.0, True),
    (BALANCED, 5, 25.5, 25.0, float("nan"), True), (BALANCED, 2, 25.5, 25.0, 1.386, False),
    # Batch norm's averages are not there yet.
    (BALANCED, 5, 40.0, 25.0, 9.0, False), (BALANCED, 5, 28.0, 33.0, 1.386, False),
    (BALANCED, 5, 27.0, 27.0, 1.3, False),
    # Always the large class, without and with an idea of where that is wrong.
    (LOPSIDED, 5, 90.0, 90.0, 0.325, True), (LOPSIDED, 5, 90.0, 90.0, 0.25, False)])
def test_what_counts_as_nothing_learnt(capsys, labels, epoch, train_top1, test_top1, nll, warned):
    part = torch.zeros(len(labels), 3, 1, 1), labels
    learnt = dict(train_top1=99, test_top1=99, test_nll=0.1, best_top1=99, loss_ce=1.0, lr=0.1,
                  seconds=1.0, images_per_second=9.0)
    history = [learnt | dict(epoch=k) for k in range(1, epoch)]
    history.append(learnt | dict(epoch=epoch, train_top1=train_top1, test_top1=test_top1,
                                 test_nll=nll))
    # A warm-up of 2.4 epochs.
    s = train.resolve(train.Settings(method="ce", epochs=24))
    console.print_epoch(s, data.Dataset(part, part, ["a", "b"], (), (), False), history)
    assert ("\nwarning   " in capsys.readouterr().out) == warned


def test_no_committed_run_would_be_warned_of(capsys):
    """Whatever the rate that was tried: transformers of 47 classes, and 100 classes, learn."""
    sizes, epochs = dict(glyphs=(47, 16_000, 5000), cifar100=(100, 50_000, 10_000),
                         folder=(6, 1822, 202)), 0
    sizes["glyphs-noisy"] = sizes["glyphs"]
    for path in (Path(__file__).parent.parent / "results").rglob("metrics.jsonl"):
        config = json.loads((path.parent / "config.json").read_text())
        s = train.Settings(**{field: config.get(field) for field in vars(train.Settings())})
        C, *counts = sizes[s.dataset]
        parts = [(None, torch.arange(n) % C) for n in counts]
        history = []
        for line in path.read_text().splitlines():
            history.append(json.loads(line))
            console.print_epoch(s, data.Dataset(*parts, [], (), (), False), history)
            epochs += 1
    assert epochs > 3000 and "warning" not in capsys.readouterr().out


def test_eval_measures_a_foreign_file_at_the_size_that_is_said(colors, color_teacher, command):
    torch.save(torch.load(color_teacher, weights_only=True)["model"], "bare.pt")
    foreign = ("bare.pt", "--model", "resnet8", "--dataset", "folder", "--data-dir", colors)
    status, out, _ = command(evaluation, *foreign, "--image-size", 16, "--json")
    assert status == 0
    found, own = json.loads(out), json.loads(command(evaluation, color_teacher, "--json")[1])
    # All but the time that an image takes.
    del found["milliseconds"], own["milliseconds"]
    assert found == own
    refused(command(evaluation, *foreign, "--image-size", 0), "--image-size 0")


@pytest.mark.parametrize("change", ["none", "moved", "added", "removed", "changed", "test part",
                                    "copied", "another folder"])
def test_resume_notices_other_images(trained, command, change):
    root, best = Path("photos"), Path("run/best.pt").read_bytes()
    image, more = root / "train/red/0.png", ()
    if change == "moved":
        more = "--data-dir", root.rename("moved")
    elif change == "added":
        shutil.copy2(image, root / "train/red/new.png")
    elif change == "removed":
        image.unlink()
    elif change == "changed":
        Image.new("RGB", (16, 16)).save(image)
    elif change == "test part":
        (root / "val/red/0.png").unlink()
    elif change in ("copied", "another folder"):
        # With times of its own.
        more = "--data-dir", shutil.copytree(root, Path("other"), copy_function=shutil.copy)
        if change == "another folder":
            shutil.copy(more[1] / "train/red/8.png", more[1] / "train/red/7.png")
    result = command(train, "--resume", "--run-dir", "run", *more)
    if change in ("none", "moved", "copied"):
        assert result[0] == 0, result[2]
    else:
        refused(result, "not the images of this run")
        assert Path("run/best.pt").read_bytes() == best


def test_a_table_does_not_mix_folders_of_images(colors, color_teacher, base, command,
                                                tmp_path):
    other = shutil.copytree(colors, tmp_path / "other")
    shutil.copy(other / "train/red/8.png", other / "train/red/7.png")
    for name, root in (("a", colors), ("b", other)):
        flags = [root if word == colors else word for word in base[:-1]]
        assert command(train, *flags, f"t/{name}/seed0", "--method", "ce", "--teacher", "x")[0] == 2
        flags = flags[:flags.index("--teacher")] + flags[flags.index("--device"):]
        assert command(train, *flags, f"t/{name}/seed0", "--method", "ce", "--epochs", 1)[0] == 0
    status, out, _ = command(evaluation, "--table", "t")
    _, a, b = out.split("**images ")
    assert status == 0 and "\n| a |" in a and "| b |" not in a and "\n| b |" in b
    # The seeds of a row neither.
    shutil.move("t/b/seed0", "t/a/seed1")
    config = json.loads(Path("t/a/seed1/config.json").read_text())
    Path("t/a/seed1/config.json").write_text(json.dumps(config | dict(seed=1)))
    refused(command(evaluation, "--table", "t"), "mixes runs of different images")


@pytest.mark.parametrize("run_dir", ["file", "file/run", "sealed/run"])
def test_a_bad_run_dir_is_said_before_a_teacher_is_trained(colors, base, command,
                                                           run_dir):
    if run_dir == "sealed/run" and (not hasattr(os, "geteuid") or os.geteuid() == 0):
        pytest.skip("to root no folder is sealed")
    Path("file").write_text("here")
    Path("sealed").mkdir(mode=0o500)
    refused(command(train, *base, "--run-dir", run_dir), f"--run-dir {run_dir}")
    assert Path("file").read_text() == "here" and not Path("runs").exists()


@pytest.mark.parametrize("arguments", ["--temperatures 1e39", "--temperatures 1e-30",
                                       "--temperatures 4 " + "9" * 400, "--epochs " + "9" * 400,
                                       "--omega 1e308 --teacher-fix add", "--weight-decay 1e308",
                                       "--seed " + "1" * 400, "--kd-weight 1e308"])
def test_numbers_beyond_reason_are_said_by_name(base, command, arguments):
    refused(command(train, *base, *arguments.split()), arguments.split()[0])


@pytest.mark.parametrize("flags, culprit", [
    ("--table t --json", "--json"), ("--table t --device cpu", "--device"),
    ("--plot run --dataset glyphs", "--dataset"), ("x.pt --against 1-ce", "--against"),
    ("x.pt --predict a.png --dataset glyphs", "--dataset"),
    ("x.pt --predict a.png --teacher-checkpoint y.pt", "--teacher-checkpoint"),
    ("--table t --image-size 16", "--image-size"), ("--table t --output x.png", "--output"),
    ("x.pt --output x.png", "--output")])
def test_eval_refuses_flags_without_effect(command, flags, culprit):
    refused(command(evaluation, *flags.split()), f"{culprit}: has no effect with")


def test_resume_refuses_flags_without_effect(color_teacher, short, command):
    train.run(short(method="ce", epochs=1), "run")
    refused(command(train, "--resume", "--run-dir", "run", "--teacher-checkpoint", color_teacher),
            "--teacher-checkpoint")


@pytest.mark.parametrize("change", [
    dict(epochs="2"), dict(epochs=-1), dict(method="mlkd"), dict(student="resnet9"),
    dict(lr=[0.1]), dict(temperatures=3), dict(temperatures=["a"]), dict(gamma=10 ** 400),
    dict(data_dir=3), dict(seed=True), dict(hello=1), [1, 2], "text", 7, None])
def test_a_config_of_wrong_values_is_not_resumed(trained, command, change):
    config = json.loads(Path("run/config.json").read_text())
    Path("run/config.json").write_text(json.dumps(
        config | change if isinstance(change, dict) else change))
    refused(command(train, "--resume", "--run-dir", "run"), "run holds no run to go on with")


def test_resume_of_a_row_names_its_first_seed(trained, command):
    shutil.move("run", "row/seed3")
    refused(command(train, "--resume", "--run-dir", "row"), "for a run in it give row/seed3")


def test_a_cached_teacher_of_a_cut_off_config(colors, command, base):
    train.run(train.Settings(method="ce", dataset="folder", data_dir=str(colors), image_size=16,
                             student="resnet8", epochs=1, device="cpu"), "away")
    name = f"{colors.name}-16px-{data.load('folder', colors, 16).digests[0]}"
    folder = Path(f"runs/teacher-{name}-2-epochs-resnet8")
    folder.parent.mkdir()
    shutil.move("away", folder)
    (folder / "config.json").write_text("{")
    refused(command(train, *base), str(folder))


def test_a_path_is_as_good_as_its_name(colors, color_teacher):
    s = train.resolve(train.Settings(dataset="folder", data_dir=colors,
                                     teacher_checkpoint=color_teacher))
    assert (s.data_dir, s.teacher_checkpoint) == (str(colors), str(color_teacher))


def test_a_name_with_a_line_break_is_one_line(command, colors, tmp_path, base):
    root = shutil.copytree(colors, tmp_path / "two\nlines")
    (root / "train/red/0.png").write_bytes(b"no image")
    flags = [root if word == colors else word for word in base]
    refused(command(train, *flags), "two\\nlines")


def test_printed_commands_are_quoted(trained, command):
    trained.rename("my run; rm x")
    status, out, err = command(train, "--resume", "--run-dir", "my run; rm x")
    assert status == 0 and "python eval.py 'my run; rm x/last.pt'" in out


@pytest.mark.parametrize("said", [
    "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.",
    "MPS backend out of memory (MPS allocated: 8.00 GB)", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED"])
def test_memory_that_is_full_is_one_line(command, base, color_teacher, monkeypatch, said):
    def full(*arguments, **more):
        raise RuntimeError(said)
    monkeypatch.setattr(train, "train_epoch", full)
    refused(command(train, *base, "--teacher-checkpoint", color_teacher), "--batch-size 32")


@pytest.mark.parametrize("path", ["/dev/null", "folder", "sealed.pt"])
def test_eval_of_a_file_that_cannot_be_read(command, path):
    Path("folder").mkdir()
    torch.save(create_model("resnet8", 3).state_dict(), "sealed.pt")
    os.chmod("sealed.pt", 0)
    if path == "sealed.pt" and os.access(path, os.R_OK):
        pytest.skip("to root no file is sealed")
    refused(command(evaluation, path, "--model", "resnet8", "--dataset", "glyphs"), path)


@pytest.mark.parametrize("options", [
    dict(), dict(method="ce"), dict(method="dkd", standardize=True), dict(student_swap=False),
    dict(method="kd", temperatures=[1, 2]), dict(teacher_fix="add", omega=2.0), dict(detach=True),
    dict(method="mlkd"), dict(teacher_fix="mask"),
    dict(student="vit_nano"), dict(dataset="cifar10"), dict(dataset="imagenet"),
    dict(dataset="folder"), dict(dataset="folder", teacher="resnet50"),
    dict(dataset="folder", teacher="resnet50", student="mobilenet_v3_small"),
    dict(dataset="folder", teacher="resnet50", student="vit_b_16", pretrained=False)], ids=str)
def test_what_was_resolved_resolves_to_itself(options):
    """Else a run could not be resumed from its config.json."""
    s = train.resolve(train.Settings(**options))
    again = train.Settings(**json.loads(json.dumps(train.dataclasses.asdict(s))))
    assert train.resolve(again) == s


def test_a_path_given_to_a_resumed_run_leaves_a_checkpoint_that_loads(short):
    train.run(short(epochs=1), "run")
    train.run(train.Settings(data_dir=Path(short().data_dir)), "run", resume=True)
    assert load_model("run/last.pt")[1]["settings"]["data_dir"] == short().data_dir


def test_the_readmes_way_to_a_new_objective(monkeypatch):
    monkeypatch.setitem(train.losses.OBJECTIVES, "newcomer", train.losses.kd)
    row = train.RECIPES["glyphs", "sgd"]
    monkeypatch.setitem(row, "lr", row["lr"] | dict(newcomer=0.03))
    choices = train.Settings.__dataclass_fields__["method"].metadata["choices"]
    assert choices == tuple(train.losses.OBJECTIVES)[:-1]
    field = train.Settings.__dataclass_fields__["method"]
    monkeypatch.setattr(field, "metadata", dict(field.metadata, choices=(*choices, "newcomer")))
    assert train.resolve(train.Settings(method="newcomer")).lr == 0.03


def test_a_table_of_a_single_run(short, command):
    train.run(short(epochs=1), "run")
    for folder, row in (("run", "."), (".", "run")):
        status, out, _ = command(evaluation, "--table", folder)
        assert status == 0 and f"| {row} | 1 | " in out and "resnet8, 1 epoch, " in out
    Path("run/config.json").write_text("[]")
    refused(command(evaluation, "--table", "."), "needs config.json")


def test_flags_of_pretrained_without_effect(command):
    for word in ("--pretrained", "--no-pretrained"):
        refused(command(train, word), "--pretrained: there are no weights for resnet8, resnet14")


def test_a_regnet_is_not_given_one_image(command, base):
    flags = ["regnet_y_400mf" if word == "resnet8" and flag == "--student" else word
             for flag, word in zip((None, *base), base)]
    refused(command(train, *flags, "--image-size", 32, "--batch-size", 119, "--no-pretrained"),
            "--batch-size 119: leaves one image")


def test_the_cached_teacher_is_of_this_version_of_glyphs(easy_glyphs, command, monkeypatch):
    monkeypatch.setitem(train.RECIPES["glyphs", "sgd"], "teach", dict(epochs=1))
    monkeypatch.setattr(train, "measure", lambda *a: evaluation.measure(*a) | dict(top1=60.0))
    flags = ("--data-dir", easy_glyphs, "--epochs", 1, "--device", "cpu", "--method", "kd")
    assert command(train, *flags)[0] == 0
    assert Path(f"runs/teacher-glyphs-{glyphs.VERSION}-1-epochs-resnet14/last.pt").exists()


@pytest.mark.parametrize("teacher, recipe", [("resnet14", ("sgd", 0.2, 12, "weak")),
                                             ("resnet20", ("sgd", 0.2, 12, "weak")),
                                             ("vit_nano", ("adamw", 0.001, 64, "both"))])
def test_the_teacher_of_glyphs_is_trained_by_a_recipe_of_its_kind(monkeypatch, teacher, recipe):
    trained = []
    monkeypatch.setattr(train, "run", lambda settings, *a, **k: trained.append(settings))
    part = torch.zeros(64, 3, 16, 16, dtype=torch.uint8), torch.arange(64) % 47
    glyphs = data.Dataset(part, part, list("abc"), (0.5,), (0.5,), flip=False)
    train.own_teacher(train.resolve(train.Settings(teacher=teacher)), glyphs, torch.device("cpu"))
    (mine,) = trained
    mine = train.resolve(mine)
    assert (mine.student, mine.optimizer, mine.lr, mine.epochs, mine.views) == (teacher, *recipe)
