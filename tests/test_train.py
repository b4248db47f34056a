"""train.py end to end on small data: recipes, schedule, the step's invariants, files, resume."""
import contextlib
import copy
import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import data
import eval as evaluation
import losses
import train
from support import console, recipes
from support.checkpoints import load_model
from support.photographs import centre
from train import Settings, learning_rate, resolve, run


def test_the_published_experiment_needs_no_further_flag():
    s = resolve(Settings(method="sld", dataset="cifar100", teacher="resnet56", student="resnet20"))
    assert (s.epochs, s.batch_size, s.lr, s.weight_decay) == (240, 64, 0.025, 5e-4)
    assert (s.optimizer, s.schedule, s.views) == ("sgd", "step", "both")
    assert (s.temperatures, s.gamma) == ((1, 2, 3, 4, 5, 6), 150)
    assert (s.ce_weight, s.kd_weight) == (0.1, 0.9)
    assert (s.teacher_fix, s.student_swap, s.detach, s.warmup) == ("swap", True, False, 0)
    kd = resolve(Settings(method="kd", dataset="cifar100"))
    assert (kd.views, kd.temperatures, kd.lr, kd.gamma) == ("weak", (4,), 0.05, None)
    assert (kd.ce_weight, kd.kd_weight) == (0.1, 0.9)
    ce = resolve(Settings(method="ce", dataset="cifar100"))
    assert (ce.views, ce.lr, ce.teacher, ce.kd_weight) == ("weak", 0.05, None, None)
    for method in ("dkd", "rld"):
        s = resolve(Settings(method=method, dataset="cifar100"))
        assert (s.views, s.lr, s.alpha, s.beta, s.temperature) == ("weak", 0.05, 1, 8, 4)
        assert (s.ce_weight, s.kd_warmup, s.gamma, s.temperatures) == (1, 20, None, None)
    assert resolve(Settings(method="dkd", dataset="cifar100", epochs=120)).kd_warmup == 10
    s = resolve(Settings(method="mlkd", dataset="cifar100"))
    assert (s.views, s.lr, s.temperatures, s.gamma) == ("both", 0.025, (2, 3, 4, 5, 6), None)
    assert (s.ce_weight, s.kd_weight, s.teacher_fix) == (0.1, 0.9, None)


@pytest.mark.parametrize("method", ["dkd", "rld"])
def test_a_neighbours_settings_reach_its_loss(method):
    z_s, z_t, y = torch.randn(6, 5), torch.randn(6, 5), torch.arange(6) % 5
    options = dict(alpha=0.5, beta=3.0, temperature=2.0, ce_weight=0.7)
    s = resolve(Settings(method=method, kd_warmup=4.0, **options))
    expected = getattr(losses, method)(z_s, z_t, y, epoch=2, warmup=4.0, **options)
    assert train.make_objective(s)(z_s, z_t, y, 2) == expected
    assert "in full after 4 epochs" in in_words(s)


def test_mlkds_settings_reach_its_loss():
    z_s, z_t, y = torch.randn(6, 5), torch.randn(6, 5), torch.arange(6) % 5
    options = dict(temperatures=(1.5, 3.0), ce_weight=0.7, kd_weight=0.3)
    s = resolve(Settings(method="mlkd", **options))
    expected = losses.mlkd(z_s, z_t, y, **options)
    assert train.make_objective(s)(z_s, z_t, y, 2) == expected


FIXES = {"swap": "0.9 T^2 KL(swapped teacher || student) at T = 1, 2\n",
         "sort": "0.9 T^2 KL(teacher with the label moved to rank 1 || student) at T = 1, 2\n",
         "mask": "0.9 T^2 KL(teacher || student) at T = 1, 2, of rows whose teacher is right\n",
         "add": "0.9 T^2 KL(teacher + 1.5 on the label || student) at T = 1, 2\n",
         "add-wrong": "0.9 T^2 KL(teacher + 1.5 on the label where it is wrong || student) at "
                      "T = 1, 2\n",
         "none": "0.9 T^2 KL(teacher || student) at T = 1, 2\n"}


@pytest.mark.parametrize("fix", losses.TEACHER_FIXES)
def test_each_teacher_fix_reaches_the_loss_and_says_what_it_does(fix):
    z_s, z_t, y = torch.randn(6, 5), torch.randn(6, 5), torch.arange(6) % 5
    omega = 1.5 if fix.startswith("add") else None
    s = resolve(Settings(teacher_fix=fix, omega=omega, temperatures=(1.0, 2.0), gamma=0))
    expected = losses.sld(z_s, z_t, y, epoch=1, gamma=0, teacher_fix=fix, omega=omega,
                          temperatures=(1, 2))
    assert train.make_objective(s)(z_s, z_t, y, 1) == expected
    first, second, *_ = in_words(s).splitlines(keepends=True)
    assert first == f"minimise  0.1 CE(label) + {FIXES[fix]}"
    assert "KL(swapped student || student) from epoch 1 on" in second


def test_mlkd_says_what_it_minimises_and_has_columns_of_its_own():
    s = resolve(Settings(method="mlkd"))
    assert in_words(s).startswith(
        "minimise  0.1 CE(label) + 0.9 T^2 KL(teacher || student)\n"
        "          + 0.9 ||P P' - Q Q'||^2 / images: which images are alike\n"
        "          + 0.9 ||P' P - Q' Q||^2 / classes: which go together\n"
        "          at T = 2, 3, 4, 5, 6; P, Q: a batch's probabilities, teacher's and student's\n"
        "on        weak and strong views of glyphs, student resnet8\n")
    *words, heads = console.legend(s).splitlines()
    row = {key.format(part="test"): 1 for _, key, *_ in console.COLUMNS}
    assert len(console.epoch_line(row, s)) == len(heads)
    assert heads.split()[2:6] == ["ce", "teacher", "batch", "class"]
    assert any("batch, class:" in line for line in words)
    assert not {"batch", "class"} & {*console.legend(resolve(Settings())).splitlines()[-1].split()}


def in_words(s):
    return console.in_words(s, *recipes.about(s, train.RECIPES))


def test_the_default_is_sld_on_glyphs():
    s = resolve(Settings())
    assert (s.method, s.dataset, s.teacher, s.student) == ("sld", "glyphs", "resnet14", "resnet8")
    assert (s.epochs, s.gamma, s.image_size, s.evaluate) == (9, 6, 16, "test")
    assert (s.optimizer, s.schedule, s.warmup) == ("sgd", "cosine", 0.9)


def test_imagenets_recipe_is_the_papers():
    s = resolve(Settings(dataset="imagenet"))
    assert (s.teacher, s.student) == ("resnet34", "resnet18")
    assert (s.epochs, s.batch_size, s.lr) == (100, 512, 0.2)
    assert (s.weight_decay, s.schedule, s.warmup, s.image_size) == (1e-4, "step", 0, 224)
    assert (s.ce_weight, s.kd_weight, s.gamma, s.pretrained) == (0.5, 0.5, 62, False)
    rates = [learning_rate(s, done) for done in (29.99, 30, 59.99, 60, 89.99, 90, 99.99)]
    assert rates == pytest.approx([0.2, 0.02, 0.02, 0.002, 0.002, 2e-4, 2e-4])
    assert "x0.1 after epoch 30, 60, 90, weight decay 0.0001" in in_words(s)
    assert resolve(Settings(method="dkd", dataset="imagenet")).ce_weight == 1
    assert resolve(Settings(method="ce", dataset="imagenet")).ce_weight is None
    mlkd = resolve(Settings(method="mlkd", dataset="imagenet"))
    assert (mlkd.ce_weight, mlkd.kd_weight, mlkd.views) == (0.5, 0.5, "both")


def test_photographs_with_torchvisions_networks_are_fine_tuned():
    theirs = dict(dataset="folder", teacher="resnet50", student="mobilenet_v3_small")
    s = resolve(Settings(**theirs))
    assert (s.pretrained, s.image_size, s.batch_size, s.optimizer) == (True, 224, 64, "adamw")
    assert (s.epochs, s.schedule, s.warmup, s.gamma) == (10, "cosine", 1, 6)
    assert resolve(Settings(**theirs, optimizer="sgd")).lr < s.lr
    s = resolve(Settings(**theirs, pretrained=False))
    assert (s.pretrained, s.image_size, s.epochs, s.lr, s.optimizer) == (False, 224, 60, 0.025,
                                                                         "sgd")
    assert resolve(Settings(**theirs | dict(student="vit_b_16"))).optimizer == "adamw"
    ours = resolve(Settings(dataset="folder"))
    assert (ours.pretrained, ours.image_size, ours.epochs) == (None, 64, 60)
    # A small student of ours learns from theirs, at their size.
    mixed = resolve(Settings(**theirs | dict(student="resnet20")))
    assert (mixed.pretrained, mixed.image_size, mixed.epochs) == (True, 224, 60)


@pytest.mark.parametrize("given, networks", [
    (dict(student="mobilenet_v2"), ("resnet50", "mobilenet_v2")),
    (dict(student="mobilenet_v2", pretrained=False), ("resnet50", "mobilenet_v2")),
    (dict(teacher="resnet18"), ("resnet18", "mobilenet_v3_small")),
    (dict(student="resnet20"), ("resnet20", "resnet20")),
    (dict(student="mobilenet_v2", dataset="cifar100"), ("resnet56", "mobilenet_v2"))])
def test_a_network_for_photographs_has_a_partner_for_photographs(given, networks):
    """Not a CIFAR ResNet, which would be trained on images of 224 pixels."""
    s = resolve(Settings(**dict(method="kd", dataset="folder") | given))
    assert (s.teacher, s.student) == networks


def test_what_each_recipe_comes_to():
    """Against what was written down before the recipes became one table."""
    for given, expected in json.loads((ROOT / "tests/golden/recipes.json").read_text()):
        found = vars(resolve(Settings(**given)))
        found = {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()
                 if v is not None}
        assert found == expected, given


def test_a_fine_tuned_teacher_takes_the_students_steps():
    s = resolve(Settings(dataset="folder", student="mobilenet_v3_small", epochs=30, batch_size=16))
    mine = recipes.of_teacher(s, train.RECIPES, 186)
    assert (mine["student"], mine["epochs"], mine["batch_size"]) == ("resnet50", 30, 16)
    # Others have a recipe of their own.
    s = resolve(Settings(epochs=30, batch_size=16))
    mine = recipes.of_teacher(s, train.RECIPES, 16_000)
    assert (mine["student"], mine["epochs"], mine["batch_size"]) == ("resnet14", 12, 64)


def test_glyphs_has_tuned_rates_and_the_other_data_sets_the_published_ones():
    """All but mlkd's on glyphs, which is sld's."""
    methods = ("ce", "kd", "sld", "dkd", "rld", "mlkd")
    rates = {name: [resolve(Settings(method=method, dataset=name)).lr for method in methods]
             for name in data.DATASETS}
    assert rates.pop("glyphs") == rates.pop("glyphs-noisy") == [0.4, 0.4, 0.1, 0.05, 0.1, 0.1]
    assert rates.pop("imagenet") == [0.2] * 6
    assert set(map(tuple, rates.values())) == {(0.05, 0.05, 0.025, 0.05, 0.05, 0.025)}
    assert {resolve(Settings(dataset=name)).schedule for name in rates} == {"step"}
    assert resolve(Settings(lr=0.3, schedule="step", warmup=0.0)).lr == 0.3


def test_a_vit_student_has_its_own_recipe():
    s = resolve(Settings(student="vit_nano"))
    assert (s.optimizer, s.schedule) == ("adamw", "cosine") and s.warmup > 0
    published = resolve(Settings(student="vit_nano", optimizer="sgd", dataset="cifar100"))
    assert published.schedule == "step"


def test_the_learning_rate_drops_after_150_180_210_of_240():
    s = resolve(Settings(dataset="cifar100"))
    factors = {1: 1, 150: 1, 151: .1, 180: .1, 181: .01, 210: .01, 211: .001, 240: .001}
    for epoch, factor in factors.items():
        for within in (0.0006, 0.9994):
            assert learning_rate(s, epoch - 1 + within) == pytest.approx(0.025 * factor)
    short = resolve(Settings(dataset="cifar100", epochs=12))
    assert short.gamma == 8 and learning_rate(short, 7.99) == 0.025
    assert learning_rate(short, 8.01) == pytest.approx(0.0025)


def test_cosine_with_warm_up():
    s = resolve(Settings(student="vit_nano", epochs=20, lr=1.0, warmup=2))
    assert [round(learning_rate(s, t), 6) for t in (1, 2, 11, 20)] == [0.5, 1.0, 0.5, 0.0]


@pytest.mark.parametrize("method, change, names", [
    ("ce", {}, {"ce"}), ("ce", dict(views="both"), {"ce"}), ("kd", {}, {"ce", "teacher"}),
    ("kd", dict(views="both", temperatures=(1.0, 2.0)), {"ce", "teacher"}),
    ("sld", {}, {"ce", "teacher", "student"}),
    ("sld", dict(teacher_fix="add", omega=2.0), {"ce", "teacher", "student"}),
    ("sld", dict(teacher_fix="add-wrong", omega=2.0), {"ce", "teacher", "student"}),
    ("sld", dict(teacher_fix="sort"), {"ce", "teacher", "student"}),
    ("sld", dict(teacher_fix="mask"), {"ce", "teacher", "student"}),
    ("sld", dict(student_swap=False), {"ce", "teacher"}),
    ("sld", dict(teacher_fix="none", detach=True, gamma=0, views="weak"),
     {"ce", "teacher", "student"}),
    ("sld", dict(standardize=True, batch_size=8), {"ce", "teacher", "student"}),
    ("dkd", dict(beta=2.0, batch_size=8, lr=0.01), {"ce", "teacher"}),
    ("dkd", dict(beta=2.0, views="both", batch_size=8, lr=0.01), {"ce", "teacher"}),
    ("rld", dict(beta=2.0, batch_size=8, lr=0.01), {"ce", "teacher"}),
    ("mlkd", dict(batch_size=8, lr=0.01), {"ce", "teacher", "batch", "class"})])
def test_each_method_trains(short, method, change, names, request):
    if not change or method == "mlkd":
        # The curves of each kind of log, once.
        request.getfixturevalue("painted")
    history = run(short(method=method, **change), "run")
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]
    last = history[-1]
    assert {key[5:] for key in last if key.startswith("loss_")} == names
    assert last["loss"] == pytest.approx(sum(v for k, v in last.items() if k.startswith("loss_")))
    assert last["test_top1"] > 50 and last["best_top1"] == max(row["test_top1"] for row in history)
    assert ("swap_teacher_weak" in last) == (method != "ce")
    both = resolve(short(method=method, **change)).views == "both"
    assert ("swap_teacher_strong" in last) == (method != "ce" and both)
    # Gamma is 2, of 4 epochs.
    if method == "sld" and "gamma" not in change and "student_swap" not in change:
        assert ["loss_student" in row for row in history] == [False, False, True, True]


def test_a_run_folder_describes_itself(short, painted):
    history = run(short(), "run")
    assert [json.loads(line) for line in open("run/metrics.jsonl")] == history
    config = json.load(open("run/config.json"))
    assert set(config) == {field.name for field in dataclasses.fields(Settings)}
    assert config["gamma"] == 2 and config["temperatures"] == [1, 2, 3, 4, 5, 6]
    assert config["amp"] in (True, False)
    environment = json.load(open("run/env.json"))
    assert {"torch", "python", "device", "commit", "command"} <= set(environment)
    for name in ("last.pt", "best.pt"):
        checkpoint = torch.load(f"run/{name}", weights_only=True)
        assert set(checkpoint["model"]) == set(train.create_model("resnet8", 3).state_dict())
    assert sorted(os.listdir("run")) == ["best.pt", "config.json", "curves.png", "env.json",
                                         "last.pt", "lock", "metrics.jsonl"]
    assert Path("run/curves.png").read_bytes()[:4] == b"\x89PNG"


def test_val_measures_on_a_tenth_that_is_not_trained_on(short, colors, command):
    images, labels = data.load("folder", colors, 16).train
    val = data.load("folder", colors, 16, evaluate="val")
    rows, trained = ({image.numpy().tobytes() for image in centre(part, 16)}
                     for part in (images, val.train[0]))
    measured = {image.numpy().tobytes() for image in val.test[0]}
    assert trained | measured == rows and not trained & measured
    assert (len(val.train[1]), len(val.test[1])) == (108, 12)
    history = run(short(evaluate="val"), "run")
    assert {"val_top1", "val_top5", "val_nll"} <= set(history[-1])
    assert not any(key.startswith("test_") for key in history[-1])
    assert json.load(open("run/config.json"))["evaluate"] == "val"
    status, out, _ = command(train, "--resume", "--run-dir", "run")
    assert status == 0 and "108 training and 12 validation images" in out
    assert " val% " in out and "(selected on val)" in out
    status, _, err = command(train, "--resume", "--run-dir", "run", "--evaluate", "test")
    assert status == 2 and "leave out --evaluate" in err


def test_a_teacher_for_val_does_not_know_the_images_that_are_measured_on(colors):
    settings = Settings(dataset="folder", data_dir=str(colors), image_size=16, teacher="resnet8",
                        epochs=4, evaluate="val")
    run(settings, "run")
    teacher, = data.Path("runs").glob("teacher-*-val-4-epochs-resnet8")
    assert json.loads((teacher / "config.json").read_text())["evaluate"] == "val"


def test_eval_gives_the_numbers_of_the_log(trained, command):
    history = rows_of(trained)
    status, out, _ = command(evaluation, "run/last.pt", "--json")
    report = json.loads(out)
    assert status == 0
    assert report["top1"] == history[-1]["test_top1"]
    assert report["nll"] == history[-1]["test_nll"]
    best = json.loads(command(evaluation, "run/best.pt", "--json")[1])
    assert best["top1"] == history[-1]["best_top1"]


def train_one_epoch(s, teacher, epoch=1):
    """One epoch by train_epoch itself, on the CPU in float32: (student, the epoch's numbers)."""
    loaded = data.load(s.dataset, s.data_dir, s.image_size)
    torch.manual_seed(s.seed)
    student = train.create_model(s.student, 3, s.image_size)
    optimizer = torch.optim.SGD(student.parameters(), s.lr, momentum=0.9,
                                weight_decay=s.weight_decay)
    autocast, scaler = train.mixed_precision(torch.device("cpu"), on=False)
    learner = train.Learner(student, student, teacher, None, optimizer, autocast, scaler)
    return student, train.train_epoch(s, epoch, learner, loaded)


def test_an_epoch_is_the_plain_loop(short, color_teacher):
    """The twenty lines a reader would write: (S6) for each view, a kl call for each temperature."""
    s = resolve(short(gamma=0, amp=False, lr=1e-3))
    teacher = load_model(color_teacher)[0].requires_grad_(False)
    ours, sums = train_one_epoch(s, teacher)

    loaded = data.load(s.dataset, s.data_dir, s.image_size)
    torch.manual_seed(s.seed)
    student = train.create_model("resnet8", 3)
    optimizer = torch.optim.SGD(student.parameters(), s.lr, momentum=0.9,
                                weight_decay=s.weight_decay)
    total, wrong = 0, 0
    for views, y in data.batches(loaded, s.batch_size, "both", s.seed, 1):
        loss = 0
        for view in views:
            z_s, z_t = student(view), teacher(view)
            wrong += (z_t.argmax(1) != y).sum().item()
            loss = loss + 0.1 * torch.nn.functional.cross_entropy(z_s, y)
            for T in range(1, 7):
                loss = loss + 0.9 * losses.kl(z_s, losses.swap(z_t, y), T)
                loss = loss + 0.9 * losses.kl(z_s, losses.swap(z_s, y), T)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(y)
    assert sums["loss"] == pytest.approx(total / len(loaded.train[1]), rel=1e-4)
    both = sums["swap_teacher_weak"] + sums["swap_teacher_strong"]
    assert both == pytest.approx(100 * wrong / len(loaded.train[1]))
    torch.manual_seed(s.seed)
    start = train.create_model("resnet8", 3).state_dict()
    for name, value in student.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-3, atol=1e-4)
        assert "num_batches" in name or (value - start[name]).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["kd", "sld"])
@pytest.mark.parametrize("amp", [False, True])
def test_the_teacher_is_frozen_and_outside(short, color_teacher, monkeypatch, method, amp):
    held, real = [], train.get_teacher
    def get_teacher(*a):
        teacher, digest = real(*a)
        held.append((teacher, copy.deepcopy(teacher.state_dict())))
        return teacher, digest
    monkeypatch.setattr(train, "get_teacher", get_teacher)
    file = color_teacher.read_bytes()
    run(short(method=method, amp=amp, epochs=2), "run")
    (teacher, before), = held
    assert not teacher.training and before
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert color_teacher.read_bytes() == file
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    checkpoint = torch.load("run/last.pt", weights_only=True)
    student = train.create_model("resnet8", 3)
    moved = checkpoint["optimizer"]["param_groups"][0]["params"]
    assert len(moved) == len(list(student.parameters()))


def test_the_teacher_sees_the_very_tensors_that_the_student_sees(short, color_teacher):
    s = resolve(short())
    teacher = load_model(color_teacher)[0].requires_grad_(False)
    seen = []
    teacher.register_forward_hook(lambda module, x, out: seen.append(x[0].clone()))
    watched = []
    create = train.create_model
    def watch(*a):
        model = create(*a)
        model.register_forward_hook(lambda module, x, out: watched.append(x[0].clone()))
        return model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "create_model", watch)
        train_one_epoch(s, teacher)
    # Weak first, then strong.
    pairs = [torch.cat(watched[i:i + 2]) for i in range(0, len(watched), 2)]
    assert len(seen) == 4 and [len(x) for x in seen] == [64, 64, 64, 48]
    assert all(map(torch.equal, seen, pairs))
    assert not torch.equal(watched[0], watched[1])


@pytest.mark.parametrize("change", [
    dict(method="ce"), dict(method="kd"), dict(method="sld"),
    dict(method="sld", student="vit_nano"),
    dict(method="kd", optimizer="sgd", schedule="cosine"),
    dict(method="ce", optimizer="adamw", schedule="step"),
    # It has dropout.
    dict(method="ce", student="squeezenet1_1", image_size=17, pretrained=False)],
    ids=["ce", "kd", "sld", "sld-adamw-cosine", "kd-sgd-cosine", "ce-adamw-step", "dropout"])
def test_resume_is_exact(short, change, monkeypatch):
    """Stopped after epoch 1, and again after epoch 2, when gamma and the first drop of the rate
    come."""
    whole = run(short(**change), "whole")

    class Stop(Exception):
        pass
    real, begun = train.train_epoch, []
    def interrupted(s, epoch, *rest):
        begun.append(epoch)
        if begun in ([1, 2], [1, 2, 2, 3]):
            raise Stop
        return real(s, epoch, *rest)
    monkeypatch.setattr(train, "train_epoch", interrupted)
    with pytest.raises(Stop):
        run(short(**change), "cut")
    for stopped in (True, False):
        # An epoch whose checkpoint was never written, and a torn one.
        with open("cut/metrics.jsonl", "a") as file:
            file.write('{"epoch": 99, "test_top1": 100.0}\n{"epo')
        with pytest.raises(Stop) if stopped else contextlib.nullcontext():
            again = run(Settings(), "cut", resume=True)
    assert begun == [1, 2, 2, 3, 3, 4]
    def timeless(rows):
        return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")}
                for row in rows]
    assert timeless(again) == timeless(whole)
    assert timeless([json.loads(line) for line in open("cut/metrics.jsonl")]) == timeless(whole)
    for name in ("last.pt", "best.pt"):
        a, b = (torch.load(f"{run_dir}/{name}", weights_only=True)["model"]
                for run_dir in ("whole", "cut"))
        assert all(torch.equal(a[k], b[k]) for k in a)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_resuming_a_finished_run_changes_nothing(trained):
    history = rows_of(trained)
    before = open("run/last.pt", "rb").read()
    assert run(Settings(), "run", resume=True) == history
    assert open("run/last.pt", "rb").read() == before


def test_the_teacher_is_trained_first_and_then_cached(colors, command, monkeypatch):
    # However good it is after an epoch.
    monkeypatch.setattr(train, "measure", lambda *a: evaluation.measure(*a) | dict(top1=60.0))
    arguments = ("--dataset", "folder", "--data-dir", colors, "--image-size", 16, "--teacher",
                 "resnet8", "--epochs", 1, "--device", "cpu")
    status, out, _ = command(train, *arguments)
    assert status == 0 and out.count("no resnet8 teacher") == 1 and "test top-1" in out
    status, out, _ = command(train, *arguments)
    assert status == 0 and "no resnet8 teacher" not in out
    *runs, teacher = sorted(os.listdir("runs"))
    assert runs == [f"{colors.name}-sld-resnet8", f"{colors.name}-sld-resnet8-2"]
    assert all(os.listdir(f"runs/{run}") == ["seed0"] for run in runs)
    # Another seed of the same experiment lies beside the first, so that --table has one row of it.
    assert command(train, *arguments, "--seed", 1)[0] == 0
    assert sorted(os.listdir(f"runs/{runs[0]}")) == ["seed0", "seed1"]
    assert teacher.startswith(f"teacher-{colors.name}-16px-")
    assert teacher.endswith("-1-epochs-resnet8")


def test_a_pretrained_teacher_and_student_on_photographs(colors, command, published, monkeypatch):
    state, name = published("shufflenet_v2_x0_5"), "shufflenet_v2_x0_5"
    arguments = ("--dataset", "folder", "--data-dir", colors, "--image-size", 16, "--device", "cpu")
    status, out, err = command(train, *arguments, "--method", "ce", "--student", name, "--lr", 1e-9,
                               "--epochs", 1, "--run-dir", "ce")
    assert status == 0, err
    said = f"   {name} from torchvision's ImageNet weights, with a new last layer for 3"
    assert f"network{said}" in out
    trained = torch.load("ce/last.pt", weights_only=True)["model"]
    weights = [key for key in state if key.endswith("weight") and not key.startswith("fc")]
    assert all(torch.allclose(trained[key], state[key], atol=1e-6) for key in weights)
    # It opens without a flag.
    status, out, err = command(evaluation, "ce/last.pt")
    assert status == 0 and "top1" in out, err
    # A teacher is fine-tuned first, and is another one than without the weights.
    monkeypatch.setattr(train, "measure", lambda *a: dict(top1=60.0, top5=100.0, nll=1.0))
    seen = []
    monkeypatch.setattr(train, "predict", lambda *a, **k: seen.append(k) or evaluation.predict(*a))
    for more, endings in (((), ["-pretrained-batch-32"]),
                          (["--no-pretrained"], ["", "-pretrained-batch-32"])):
        status, out, err = command(train, *arguments, "--teacher", name, "--student", name, *more,
                                   "--method", "kd", "--batch-size", 32, "--epochs", 1)
        # While the teacher trains, nothing is called the student.
        assert status == 0 and out.count(f"network{said}") == (not more), err
        assert out.count(f"student{said}") == (not more)
        assert f"no {name} teacher for this data yet: training it first, in runs/teacher-" in out
        assert ", which takes about 1 min\n" in out
        # The log of its own training says how good it is: no pass over the images for that.
        assert f"-{name}/last.pt: 60.00 % test top-1" in out and seen == 2 * [{}]
        seen.clear()
        teachers = [path.name for path in data.Path("runs").glob("teacher-*")]
        # A digest of twelve figures comes before the ending.
        assert {path.split("-16px-")[1][12:] for path in teachers} == {
            f"{ending}-1-epochs-{name}" for ending in endings}


@pytest.mark.parametrize("role, culprit", [("--student", "--student "), ("--teacher", "")])
def test_missing_weights_are_said_before_anything_is_trained(colors, command, published, role,
                                                             culprit):
    published("shufflenet_v2_x0_5")
    other = {"--student": "--teacher", "--teacher": "--student"}[role]
    status, out, err = command(train, "--dataset", "folder", "--data-dir", colors, role,
                               "mobilenet_v3_small", other, "shufflenet_v2_x0_5",
                               "--image-size", 32, "--device", "cpu")
    # torch's own line about the download may come before.
    *_, line = err.splitlines()
    said = f"train.py: {culprit}mobilenet_v3_small: cannot load mobilenet_v3_small-047dcff4.pth"
    assert status == 2 and line.startswith(said) and "Traceback" not in err
    assert "hub/checkpoints" in line and not data.Path("runs").exists()


def test_an_imagenet_teacher_is_used_as_published(imagenet, command, published):
    published("shufflenet_v2_x0_5", bias=1.0)
    arguments = ("--dataset", "imagenet", "--data-dir", imagenet, "--teacher", "shufflenet_v2_x0_5",
                 "--student", "resnet8", "--image-size", 8, "--epochs", 2, "--method", "kd",
                 "--device", "cpu", "--no-pretrained", "--run-dir", "run")
    status, out, err = command(train, *arguments)
    assert status == 0, err
    assert "teacher   shufflenet_v2_x0_5 from torchvision: 100.00 % test top-1" in out
    assert "1000 training and 20 test images, 1000 classes, 8 px" in out
    assert not data.Path("runs").exists()
    status, out, err = command(train, "--resume", "--run-dir", "run")
    assert status == 0, err


def test_a_run_from_before_there_was_a_validation_part_goes_on(trained):
    history = rows_of(trained)
    config = json.load(open("run/config.json"))
    del config["evaluate"]
    json.dump(config, open("run/config.json", "w"))
    assert run(Settings(), "run", resume=True) == history


def test_seeds_differ_and_repeat(short):
    a, b, c = (run(short(method="ce", seed=seed, epochs=1), name)[0]["loss"]
               for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert a == b != c


def test_the_default_run_says_what_it_minimises(easy_glyphs, command, monkeypatch):
    # However good the teacher is after an epoch.
    monkeypatch.setattr(train, "measure", lambda *a: evaluation.measure(*a) | dict(top1=60.0))
    status, out, err = command(train, "--method", "ce", "--student", "resnet14", "--data-dir",
                               easy_glyphs, "--epochs", 1, "--run-dir", "teacher")
    # As while train.py trains a teacher first: nothing of a student, nor of swaps.
    assert status == 0 and "student" not in out and "swap" not in out, err
    status, out, err = command(train, "--method", "sld", "--data-dir", easy_glyphs, "--epochs", 2,
                               "--teacher-checkpoint", "teacher/last.pt")
    assert status == 0, err
    assert "0.9 T^2 KL(swapped teacher || student) at T = 1, 2, 3, 4, 5, 6" in out
    assert "KL(swapped student || student) from epoch 2 on" in out
    assert "weak and strong views" in out
    rows = [line for line in out.splitlines() if line.split()[:1] in (["epoch"], ["1"], ["2"])]
    assert len({len(line) for line in rows}) == 1 and len(rows) == 3


def test_a_vit_as_student_and_as_teacher(short):
    """A resnet8 teaches it, and it teaches another."""
    first = run(short(student="vit_nano", batch_size=8), "teacher")
    history = run(short(teacher="vit_nano", teacher_checkpoint="teacher/last.pt", batch_size=8,
                        lr=0.005), "run")
    # Chance is 33 %.
    assert first[-1]["test_top1"] > 50 and history[-1]["test_top1"] > 50


@pytest.mark.parametrize("change", [
    dict(views="strong"), dict(method="mlld"), dict(student="resnet9"), dict(temperatures=()),
    dict(gamma=9), dict(evaluate="train")])
def test_a_notebooks_mistakes_raise_one_line(change):
    with pytest.raises(data.UserError, match=next(iter(change))):
        resolve(Settings(**change))


def test_a_teacher_interrupted_in_its_first_epoch_is_trained_again(colors, command, monkeypatch):
    arguments = ("--dataset", "folder", "--data-dir", colors, "--image-size", 16, "--teacher",
                 "resnet8", "--epochs", 1, "--device", "cpu")
    real, calls = train.train_epoch, []
    def interrupted(*a):
        calls.append(a)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return real(*a)
    monkeypatch.setattr(train, "train_epoch", interrupted)
    status, _, err = command(train, *arguments)
    assert status == 130 and "the same command goes on with the teacher" in err
    status, out, err = command(train, *arguments)
    assert status == 0 and "going on with it first" in out, err


def test_a_full_gpu_names_the_batch_size_and_a_smaller_one(short, monkeypatch):
    def full(*a):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
    monkeypatch.setattr(train, "train_epoch", full)
    with pytest.raises(data.UserError, match="--batch-size 32: .* try --batch-size 16$"):
        run(short(), "run")


@pytest.mark.parametrize("error, said", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB\nMore"), "20.00 MiB"),
    # While another program fills the GPU, and as MPS and NumPy say it.
    (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), "CUDA error"),
    (RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"), "8.00 GB"),
    (MemoryError(), "()")], ids=str)
@pytest.mark.parametrize("where", ["keep_on", "begin"])
def test_a_memory_that_is_full_before_the_first_step_is_one_line(command, base, color_teacher,
                                                                 monkeypatch, where, error, said):
    def full(*a):
        raise error
    # As on a GPU, to which the images move.
    monkeypatch.setattr(train, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(train, "keep_on", lambda *a: None)
    monkeypatch.setattr(train, where, full)
    status, _, err = command(train, *base, "--teacher-checkpoint", color_teacher)
    assert status == 2 and err.count("\n") == 1
    assert "--device: its memory is full" in err and said in err


def test_mixed_precision_follows_float32(short):
    """Loss by loss over three seeds."""
    for seed in range(3):
        mixed, exact = (run(short(seed=seed, amp=amp, lr=1e-3, epochs=3), f"{amp}{seed}")
                        for amp in (True, False))
        assert mixed != exact
        expected = pytest.approx([row["loss"] for row in exact], rel=0.02)
        assert [row["loss"] for row in mixed] == expected


def scaled(scale):
    """float32 under a GradScaler that starts at `scale`: float16's bookkeeping, on the CPU."""
    return lambda device, on: (torch.autocast("cpu", torch.bfloat16, enabled=False),
                               torch.amp.GradScaler("cpu", init_scale=scale))


def test_the_grad_scaler_changes_no_result(short, monkeypatch):
    plain = run(short(epochs=2, amp=False), "plain")
    monkeypatch.setattr(train, "mixed_precision", scaled(2.0 ** 10))
    expected = pytest.approx([row["loss"] for row in plain], rel=1e-5)
    assert [row["loss"] for row in run(short(epochs=2), "scaled")] == expected


def test_skipped_steps_are_counted(short, monkeypatch, capsys):
    monkeypatch.setattr(train, "mixed_precision", scaled(2.0 ** 126))
    history = run(short(method="kd", batch_size=4, lr=0.005), "run")
    skipped = sum(row["skipped_steps"] for row in history)
    # The scaler halves its scale at each step that it leaves out.
    scale = torch.load("run/last.pt", weights_only=True)["scaler"]["scale"]
    assert skipped > 0 and scale == 2.0 ** (126 - skipped) and history[-1]["test_top1"] > 50
    lines = [line for line in capsys.readouterr().out.splitlines() if "steps skipped" in line]
    assert sum(int(line.split()[-3]) for line in lines) == skipped


def test_a_run_whose_every_step_is_skipped_stops(short, monkeypatch):
    """A gradient that no scale makes finite, under a finite loss."""
    monkeypatch.setattr(train, "mixed_precision", scaled(2.0 ** -23))
    backward = torch.Tensor.backward

    def overflow(loss, *a):
        backward(loss * torch.inf, *a)
    monkeypatch.setattr(torch.Tensor, "backward", overflow)
    with pytest.raises(data.UserError, match="epoch 1: 4 steps were skipped, .* no epoch is sa"):
        run(short(), "run")


@pytest.mark.parametrize("scale", [None, 2.0 ** 16], ids=["float32", "with a GradScaler"])
def test_a_loss_that_is_not_finite_stops_the_run(short, trained, monkeypatch, scale):
    # As if cut off: the second epoch is to be done.
    saved = torch.load("run/last.pt", weights_only=True)
    torch.save(saved | dict(epoch=1, history=saved["history"][:1]), "run/last.pt")
    good = Path("run/last.pt").read_bytes()
    if scale:
        monkeypatch.setattr(train, "mixed_precision", scaled(scale))
    real = train.make_objective

    def broken(s):
        return lambda *inputs: {"ce": real(s)(*inputs)["ce"] / 0}
    monkeypatch.setattr(train, "make_objective", broken)
    message = r"lr 0\.[0-9e-]+: the loss is not finite; try a smaller --lr.*; "
    with pytest.raises(data.UserError, match=f"^epoch 2, step 1 of 4, {message}epoch 1 is saved$"):
        run(Settings(), "run", resume=True)
    # After so many steps that are left out the scale is too small for any.
    message = f"^epoch 1, step 1 of 60, {message}no epoch is saved$"
    with pytest.raises(data.UserError, match=message):
        run(short(batch_size=2), "new")
    assert Path("run/last.pt").read_bytes() == good and not Path("new/last.pt").exists()


def test_a_learning_rate_that_is_far_too_large(short):
    with pytest.raises(data.UserError, match="not finite"):
        run(short(method="ce", lr=1e6, batch_size=4), "run")
    assert not os.path.exists("run/last.pt")


def test_the_step_with_a_loss_that_is_not_finite_is_named(short, monkeypatch):
    """Also where it is read with others, many steps later."""
    real, calls = train.make_objective, []

    def broken(s):
        def objective(*inputs):
            calls.append(1)
            term = real(s)(*inputs)["ce"]
            # The second view of step 40.
            return {"ce": term / 0 if len(calls) == 80 else term}
        return objective
    monkeypatch.setattr(train, "make_objective", broken)
    with pytest.raises(data.UserError, match="^epoch 1, step 40 of 60, lr .*no epoch is saved$"):
        run(short(batch_size=2, dataset="folder", lr=1e-4, student="vit_nano", optimizer="sgd"),
            "run")
    assert len(calls) == 120 and not os.path.exists("run/last.pt")
