"""What several processes on GPUs would tell nccl and torchrun, without having any."""
import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import train
from models import create_model
from support import distributed, runs
from support.errors import UserError


@pytest.fixture
def group(monkeypatch):
    """The first of two processes, each with a GPU. The calls of torch.distributed, in order."""
    calls = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    for name, value in (("is_available", True), ("device_count", 2), ("current_device", 0),
                        ("set_device", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *a, value=value: value)
    for name in ("init_process_group", "barrier", "destroy_process_group"):
        monkeypatch.setattr(dist, name,
                            lambda *a, name=name, **more: calls.append((name, *a, more)))
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    return calls


def test_nccl_knows_its_gpu_and_is_closed_at_the_end(group):
    with distributed.several_processes(None):
        pass
    assert group == [("init_process_group", "nccl", dict(device_id=torch.device("cuda:0"))),
                     ("barrier", {}), ("destroy_process_group", {})]


@pytest.mark.parametrize("device, closed", [(None, False), ("cpu", True)])
def test_a_process_that_fails_does_not_wait_for_the_others(group, device, closed):
    """nccl would, and they wait for it. gloo tells them that it is gone."""
    with pytest.raises(UserError), distributed.several_processes(device):
        raise UserError("the loss is not finite")
    assert [name for name, *_ in group[1:]] == ["destroy_process_group"] * closed


def test_the_error_of_a_device_is_not_hidden(monkeypatch):
    """Any RuntimeError may mean that another process is gone, so its own words are said too."""
    monkeypatch.setattr(runs, "process", lambda: (0, 2))
    s = train.resolve(train.Settings())
    with (pytest.raises(UserError, match=r"\(CUDA error: device-side assert\); no epoch is saved"),
          runs.report_failure(s, Path("run"), [])):
        raise RuntimeError("CUDA error: device-side assert\nCUDA kernel errors might be")


def test_a_resumed_run_stays_on_its_device(command, monkeypatch):
    asked = []

    def several_processes(device):
        asked.append(device)
        raise UserError("enough")
    monkeypatch.setattr(distributed, "several_processes", several_processes)
    Path("run").mkdir()
    Path("run/config.json").write_text(json.dumps(dict(device="cpu")))
    for flags in ((), ("--device", "cuda")):
        assert command(train, "--resume", "--run-dir", "run", *flags)[0] == 2
    assert command(train, "--run-dir", "new")[0] == 2
    assert asked == ["cpu", "cuda", None]


def test_strides_that_mean_the_same_are_not_warned_of(monkeypatch):
    monkeypatch.setattr(distributed, "process", lambda: (0, 2))
    monkeypatch.setattr(distributed, "DistributedDataParallel", lambda network, **more: network)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        distributed.in_parallel(create_model("resnet8", 3))
        warnings.warn("Grad strides do not match bucket view strides. This may", stacklevel=1)
        warnings.warn("another", stacklevel=1)
    assert [str(each.message) for each in said] == ["another"]
