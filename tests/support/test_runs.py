"""Which folder a run takes, and that no two take the same."""
from pathlib import Path

import pytest
import torch

import train
from support import runs
from support.errors import UserError


def folder_of(**changes):
    """The folder that a run by default takes, where it is left as if it had been trained there."""
    s = train.resolve(train.Settings(**changes))
    with runs.opened(s, None, False) as folder:
        runs.write_json(folder / "config.json", vars(s))
    return str(folder)


def test_seeds_of_an_experiment_lie_beside_each_other():
    assert folder_of() == "runs/glyphs-sld-resnet8/seed0"
    assert folder_of(seed=1) == "runs/glyphs-sld-resnet8/seed1"
    # The same again, and another experiment of the same name, are rows of their own.
    assert folder_of() == "runs/glyphs-sld-resnet8-2/seed0"
    assert folder_of(detach=True) == "runs/glyphs-sld-resnet8-3/seed0"
    assert folder_of(detach=True, seed=1) == "runs/glyphs-sld-resnet8-3/seed1"
    assert folder_of(method="ce") == "runs/glyphs-ce-resnet8/seed0"


def test_photographs_give_a_run_their_folders_name():
    assert folder_of(dataset="folder", data_dir="my/cats") == "runs/cats-sld-resnet8/seed0"


def test_two_that_start_at_once_do_not_meet():
    s = train.resolve(train.Settings())
    with runs.opened(s, None, False) as first, runs.opened(s, None, False) as second:
        assert (str(first), str(second)) == ("runs/glyphs-sld-resnet8/seed0",
                                             "runs/glyphs-sld-resnet8-2/seed0")
        with (pytest.raises(UserError, match="another process is training there"),
              runs.opened(s, first, False)):
            pass
        # One that found the folder taken leaves the other's lock where it is.
        assert (first / "lock").exists()
    # Nothing was trained, so nothing stays.
    assert not Path("runs").exists()


def test_a_folder_that_was_there_stays():
    Path("mine").mkdir()
    with runs.opened(train.resolve(train.Settings()), "mine/run", False):
        assert Path("mine/run").is_dir()
    assert Path("mine").is_dir() and not Path("mine/run").exists()


def test_what_a_gpu_has_gone_on_with_goes_on(trained):
    """A run that was begun without --cuda-graph and resumed with it, and is resumed again."""
    saved = torch.load("run/last.pt", weights_only=True)
    settings = saved["settings"] | dict(cuda_graph=True, device="cuda")
    torch.save(saved | dict(settings=settings), "run/last.pt")
    assert len(train.run(train.Settings(device="cpu"), "run", resume=True)) == 2
