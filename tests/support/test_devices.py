"""What the devices are told, without having them."""
from types import SimpleNamespace

import pytest
import torch

import eval as evaluation
import train
from data import load
from support.devices import amp_by_default, keep_on, layout, mixed_precision, pick_device
from support.errors import UserError


def test_float32_is_float32_and_twice_the_same():
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = True, False
    pick_device("cpu")
    assert not torch.backends.cudnn.allow_tf32 and torch.backends.cudnn.deterministic


def test_on_mps_images_and_weights_stay_contiguous():
    """Batch norm's backward pass in channels_last is wrong there in many versions of torch."""
    assert layout(torch.device("mps")) == torch.contiguous_format
    assert {layout(torch.device(name)) for name in ("cpu", "cuda")} == {torch.channels_last}


def test_networks_and_images_have_the_layout_of_the_device(short, monkeypatch):
    """All of them where they are used, as on MPS."""
    for module in (train, evaluation):
        monkeypatch.setattr(module, "layout", lambda device: torch.contiguous_format)
    begin, seen = train.begin, []

    def look(module, images):
        seen.append(all(t.is_contiguous() for t in (*images, *module.parameters())))

    def watched(*about):
        learner = begin(*about)
        for network in (learner.student, learner.teacher):
            network.register_forward_pre_hook(look)
        return learner
    monkeypatch.setattr(train, "begin", watched)
    train.run(short(epochs=1), "run")
    assert seen and all(seen)


@pytest.mark.parametrize("name, where", [("mps", "cpu"), ("cuda", "cuda")])
def test_views_for_mps_are_made_on_the_cpu(short, monkeypatch, name, where):
    """batches() is told where; nothing of the run is on a device that is not here."""
    class Known(Exception):
        pass

    def batches(*about):
        assert about[-1] == torch.device(where)
        raise Known
    monkeypatch.setattr(train, "batches", batches)
    s = train.resolve(short(epochs=1))
    network = torch.nn.Linear(1, 1)
    learner = train.Learner(network, network, None, None, torch.optim.SGD(network.parameters()),
                            None, None)
    monkeypatch.setattr(network, "parameters", lambda: iter([FakeParameter(name)]))
    with pytest.raises(Known):
        train.train_epoch(s, 1, learner, load("folder", s.data_dir, 16))


class FakeParameter:
    def __init__(self, device):
        self.device = torch.device(device)


def test_photographs_stay_in_the_memory_of_the_computer():
    """They may be larger than that of the GPU."""
    part = torch.zeros(2, 3, 4, 4), torch.zeros(2)
    for area, where in ((None, "meta"), ((0.5, 1), "cpu")):
        data = SimpleNamespace(area=area, train=part, test=part)
        keep_on(torch.device("meta"), data)
        assert {t.device.type for t in (*data.train, *data.test)} == {where}


@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_gpu_takes_bfloat16_where_it_has_it(monkeypatch, has_bf16):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    # They warn that there is no GPU here.
    with pytest.warns(UserWarning):
        autocast, scaler = mixed_precision(torch.device("cuda"), on=True)
    assert autocast.fast_dtype == (torch.bfloat16 if has_bf16 else torch.float16)
    assert isinstance(scaler, torch.amp.GradScaler)


def test_a_cuda_graph_needs_a_gpu(short):
    with pytest.raises(UserError, match="^--cuda-graph: needs a CUDA device"):
        train.run(short(cuda_graph=True), "run")


def test_mixed_precision_is_the_default_on_gpus_only():
    assert amp_by_default(torch.device("cuda"))
    assert not amp_by_default(torch.device("cpu"))
