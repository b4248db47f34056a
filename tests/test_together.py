"""results/together.py: several runs at once give what each gives by itself, and either program goes
on with what the other began."""
import contextlib
import re

import pytest
import torch

import train
from results import together
from support.errors import UserError


@pytest.fixture
def group(colors, color_teacher, monkeypatch, tmp_path):
    """Three rows on `colors`, whose epochs end with a smaller batch."""
    common = (f"--dataset folder --data-dir {colors} --image-size 16 --student resnet8 --epochs 4 "
              "--batch-size 50")
    teacher = f"--teacher resnet8 --teacher-checkpoint {color_teacher}"
    rows = {"ce": f"--method ce {common}", "dkd": f"--method dkd {common} {teacher}",
            "sld": f"--method sld {common} {teacher}"}
    monkeypatch.setattr(together, "ROOT", tmp_path)
    return rows


def train_group(rows, minutes=60):
    with contextlib.ExitStack() as stack:
        opened, data, device = together.open_runs(stack, rows, "group", 0, "cpu")
        return together.train_together(opened, data, device, minutes)


def assert_same(a, b):
    assert len(a) == len(b) == 4
    for mine, other in zip(a, b):
        assert mine.keys() == other.keys()
        numbers = mine.keys() - {"seconds", "images_per_second"}
        assert {k: mine[k] for k in numbers} == pytest.approx({k: other[k] for k in numbers}, 1e-4)


def history_of(tmp_path, row):
    checkpoint = torch.load(tmp_path / f"results/group/{row}/seed0/last.pt", weights_only=True)
    return checkpoint["history"]


def alone(flags, folder):
    given = vars(together.make_parser(train.Settings, "").parse_args(flags.split()))
    del given["run_dir"], given["resume"]
    return train.run(train.Settings(**given | dict(seed=0, device="cpu", amp=False)), folder)


def test_each_run_is_what_train_py_makes_of_it(group, tmp_path):
    assert train_group(group) == 0
    for row, flags in group.items():
        assert_same(history_of(tmp_path, row), alone(flags, tmp_path / f"alone-{row}"))


@pytest.mark.slow
def test_either_program_goes_on_with_what_the_other_began(group, tmp_path):
    assert train_group(group, minutes=0) == 3
    # One epoch each. train.py goes on with one of them, together.py with the others.
    went_on = train.run(train.Settings(), tmp_path / "results/group/sld/seed0", resume=True)
    assert train_group(group) == 0
    for row, flags in group.items():
        assert_same(history_of(tmp_path, row), alone(flags, tmp_path / f"alone-{row}"))
    assert went_on == history_of(tmp_path, "sld")


def test_a_device_on_which_it_would_be_wrong_is_refused(group, monkeypatch):
    monkeypatch.setattr(together, "pick_device", torch.device)
    with pytest.raises(UserError, match="^--device mps: "), contextlib.ExitStack() as stack:
        together.open_runs(stack, group, "group", 0, "mps")
    # As on a GPU without bfloat16.
    monkeypatch.setattr(train, "mixed_precision", lambda device, on: (
        torch.autocast("cpu", torch.bfloat16, enabled=False), torch.amp.GradScaler("cpu")))
    with pytest.raises(UserError, match="float16"), contextlib.ExitStack() as stack:
        together.open_runs(stack, group, "group", 0, "cpu")


@pytest.mark.slow
def test_a_run_whose_loss_is_not_finite_does_not_stop_the_others(group, tmp_path, capsys):
    group["ce"] += " --lr 1e6"
    assert train_group(group) == 1
    assert re.search("group/ce/seed0: epoch 1: .* not finite; .*; this run stops here",
                     capsys.readouterr().out)
    assert_same(history_of(tmp_path, "sld"), alone(group["sld"], tmp_path / "alone"))
    assert not (tmp_path / "results/group/ce/seed0/last.pt").exists()
