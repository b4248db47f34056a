"""A slip of the hand is answered with the word that was meant."""
import dataclasses
import re
import shutil

import pytest
from test_bad_input import refused

import eval as evaluation
import train
from support.errors import UserError
from support.settings import GROUPS


@pytest.mark.parametrize("arguments, answer", [
    ("--methode sld", "--methode: unknown; nearest: --method;"),
    ("--studnt=resnet8", "--studnt: unknown; nearest: --student;"),
    ("-method sld", "nearest: --method;"), ("--xyz 3", "--xyz: unknown; see --help"),
    ("--no-studnt-swap", "nearest: --student-swap;"),
    ("kd", "kd: say --method kd;"), ("SLD", "SLD: say --method sld;"),
    ("cifar100", "cifar100: say --dataset cifar100;"), ("sdl", "sdl: unknown; nearest: sld;"),
    ("--method SLD", "--method SLD: unknown; nearest: sld"),
    ("--dataset floder", "--dataset floder: unknown; nearest: folder"),
    ("--device gpu", "--device gpu: unknown; nearest: cpu; choose among auto, cpu, cuda, mps"),
    ("--student ResNet8", "--student ResNet8: unknown network; nearest: resnet8, "),
    ("--temperatures 1,2,3", "--temperatures: 1,2,3: write decimals with a point, and put spaces"),
    ("--lr 0,1", "--lr: 0,1: write decimals with a point"),
    ("--method kd --temperature 4", "--temperature: no part of --method kd; nearest: "
     "--temperatures, "),
    ("--method dkd --temperatures 4", "--temperatures: no part of --method dkd; nearest: "
     "--temperature, "),
    ("--method sld --beta 2", "--beta: no part of --method sld; leave it out")])
def test_slips_on_the_way_to_train(command, arguments, answer):
    refused(command(train, *arguments.split()), answer)


@pytest.mark.parametrize("arguments, answer", [
    ("x.pt --modle resnet8", "--modle: unknown; nearest: --model;"),
    ("x.pt --dataset CIFAR10", "--dataset CIFAR10: unknown; nearest: cifar10"),
    ("x.pt --device coda", "--device coda: unknown; nearest: cuda"),
    ("x.pt --model ResNet18", "--model ResNet18: unknown network; nearest: resnet18"),
    ("x.pt y.pt", "y.pt: unknown;"), ("--export x.onnx", "give a CHECKPOINT, also for"),
    ("x.pt --export y.onnx --predict z.png", "--export: has no effect with --predict")])
def test_slips_on_the_way_to_eval(command, arguments, answer):
    refused(command(evaluation, *arguments.split()), answer)


def test_help_is_in_groups_and_has_examples(command):
    status, out, _ = command(train, "--help")
    titles = [line for line in out.splitlines() if re.fullmatch("[a-z ]+:", line)]
    assert status == 0 and titles == ["examples:", "options:", *(f"{g}:" for g in GROUPS)]
    # Every flag once, also one of a field that somebody has added.
    flags = re.findall(r"^  (--[a-z-]+)", out, re.M)
    fields = (field.name.replace("_", "-") for field in dataclasses.fields(train.Settings))
    assert sorted(flags) == sorted(["--run-dir", "--resume", *(f"--{name}" for name in fields)])


def test_a_notebook_is_answered_too():
    with pytest.raises(UserError, match="^--method SLD: unknown; nearest: sld; choose among ce, "):
        train.resolve(train.Settings(method="SLD"))


def test_the_folder_of_a_run_stands_for_its_last_checkpoint(color_teacher, short, command):
    folder = color_teacher.parent
    for more in ((), ("--teacher-checkpoint", folder), ("--predict", "x.png")):
        if more[:1] == ("--predict",):
            refused(command(evaluation, folder, *more), "x.png: not a readable image")
            continue
        status, out, err = command(evaluation, folder, *more)
        assert status == 0 and "top1                      100.0000" in out, err
    history = train.run(short(teacher_checkpoint=str(folder), epochs=1), "run")
    same = train.run(short(epochs=1), "same")
    assert history[0]["loss"] == same[0]["loss"]
    # Above the seeds of a row: the nearest run is named.
    shutil.copytree("run", "row/seed0")
    refused(command(evaluation, "row"), "models; nearest: row/seed0/last.pt")
    refused(command(train, "--resume", "row/seed0"), "row/seed0: say --run-dir row/seed0")


@pytest.fixture
def objective(monkeypatch):
    """objective(function) puts it under the name "newcomer", as the README says."""
    def add(function):
        monkeypatch.setitem(train.losses.OBJECTIVES, "newcomer", function)
        field = train.Settings.__dataclass_fields__["method"]
        monkeypatch.setattr(field, "metadata", dict(
            field.metadata, choices=tuple(train.losses.OBJECTIVES)))
    return add


def kd_like(student_logits, teacher_logits, target, *, temperatures=(4.0,), beta=3.0):
    return {"ce": train.losses.kl(student_logits, teacher_logits, temperatures[0]) * beta}


def test_a_new_objective_says_its_numbers_and_its_rate(objective, base, color_teacher, command):
    objective(kd_like)
    flags = (*base, "--teacher-checkpoint", color_teacher, "--method", "newcomer")
    status, out, err = command(train, *flags)
    assert status == 0, err
    borrowed = "at kd's learning rate, which is not tuned for newcomer on this data"
    assert "minimise  losses.newcomer: temperatures 4, beta 3\n" in out and borrowed in out
    status, out, _ = command(train, *flags, "--run-dir", "other", "--lr", 0.01, "--beta", 2,
                             "--temperatures", 1, 2)
    assert "minimise  losses.newcomer: temperatures 1 2, beta 2\n" in out and borrowed not in out


def test_a_new_objective_with_a_rate_of_its_own(objective, monkeypatch):
    objective(kd_like)
    s = train.resolve(train.Settings(method="newcomer"))
    assert s.lr == 0.4 and "kd's learning rate" in train.recipes.about(s, train.RECIPES)[1]
    row = train.RECIPES["glyphs", "sgd"]
    monkeypatch.setitem(row, "lr", row["lr"] | dict(newcomer=0.4))
    assert "rate" not in train.recipes.about(s, train.RECIPES)[1]
    # A row with one rate for all methods has none that is its own.
    s = train.resolve(train.Settings(method="newcomer", dataset="cifar100", student="vit_nano"))
    assert "kd's learning rate" in train.recipes.about(s, train.RECIPES)[1]


@pytest.mark.parametrize("function, answer", [
    (lambda z_s, z_t, y, *, nobodys=2.0: {}, "takes nobodys, which is no field of train."),
    (lambda z_s, z_t, y, *, beta: {}, "beta has no default in losses.py")])
def test_a_step_of_the_readme_that_was_forgotten(objective, command, function, answer):
    objective(function)
    refused(command(train, "--method", "newcomer"), answer)
