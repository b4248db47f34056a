"""Where each tensor lives, proven without a GPU.

FakeTensorMode makes CUDA tensors that have a shape, a type and a device, but no numbers. A CPU
tensor among them raises, and so does whatever would copy a number to the host. Backward passes and
autocast do not work on them.
"""
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import data
import eval as evaluation
import losses
import train
from models import MODELS, create_model

B, C, S = 6, 10, 32


@pytest.fixture
def cuda():
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            torch.zeros(3, device="cuda")[:, None]
        except RuntimeError:
            # torch 2.6 asks for a driver where a tensor is indexed.
            if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14):
                pytest.skip(f"torch {torch.__version__} cannot index a fake CUDA tensor without "
                            "a GPU's driver")
            raise
        yield torch.device("cuda")


def network(name, device):
    with device, pytest.MonkeyPatch.context() as patch:
        # It looks at numbers, and there are none.
        patch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor)
        return create_model(name, C, S).requires_grad_(False)


def batch(device):
    images = torch.randint(256, (B, 3, S, S), dtype=torch.uint8, device=device)
    return images, torch.randint(C, (B,), device=device)


def test_a_cpu_tensor_among_them_raises(cuda):
    with pytest.raises(Exception, match="device"):
        torch.zeros(3, device=cuda) + torch.zeros(3)
    with pytest.raises(Exception, match="_local_scalar_dense"):
        torch.zeros(1, device=cuda).item()


@pytest.mark.parametrize("name", MODELS)
def test_a_network(cuda, name, monkeypatch):
    # A fake tensor has no values to look at.
    monkeypatch.setattr(evaluation, "check_finite", lambda who, logits: None)
    images, _ = batch(cuda)
    logits = evaluation.predict(network(name, cuda), images, (.5, .5, .5), (.2, .2, .2),
                                batch_size=4)
    assert logits.shape == (B, C) and logits.device.type == "cuda" and logits.dtype == torch.float32


@pytest.mark.parametrize("options", [
    dict(method="ce"), dict(method="kd"), dict(method="sld", gamma=0),
    dict(method="sld", gamma=0, detach=True), dict(method="sld", teacher_fix="add", omega=2.0),
    dict(method="sld", teacher_fix="none"), dict(method="sld", teacher_fix="sort"),
    dict(method="sld", teacher_fix="mask"), dict(method="mlkd"),
    dict(method="sld", teacher_fix="add-wrong", omega=2.0)], ids=str)
def test_an_objective(cuda, options):
    z_s, z_t = torch.randn(2, B, C, device=cuda)
    objective = train.make_objective(train.resolve(train.Settings(**options)))
    terms = objective(z_s, z_t, batch(cuda)[1], 1)
    assert {"ce"} <= set(terms)
    assert all(term.shape == () and term.device.type == "cuda" for term in terms.values())
    wrong = losses.swap(z_s, batch(cuda)[1]), train.misclassified(z_s, batch(cuda)[1])
    assert all(each.device.type == "cuda" for each in wrong)


@pytest.mark.parametrize("area", [None, 0.35], ids=["in its memory", "photographs on the CPU"])
def test_both_views(cuda, monkeypatch, area):
    """Rows 0 and 1 stand for those that each operation works on.

    Really they are chosen on the CPU, from numbers that a fake tensor has not.
    """
    def chosen(self):
        assert self.device.type == "cpu", "a copy to the host"
        return torch.arange(2)[:, None]
    monkeypatch.setattr(torch.Tensor, "nonzero", chosen)
    parts, sizes = batch(cuda if area is None else torch.device("cpu")), []
    dataset = data.Dataset(parts, parts, list(map(str, range(C))), (.5, .5, .5), (.2, .2, .2), True,
                           area)
    for views, target in data.batches(dataset, 4, "both", 0, 1, device=cuda):
        assert [view.device.type for view in views] == ["cuda"] * 2 and target.device.type == "cuda"
        assert all(view.shape == (len(target), 3, S, S) and view.dtype == torch.float32
                   for view in views)
        sizes.append(len(target))
    assert sizes == [4, 2]


def test_the_measurements(cuda, monkeypatch):
    # The numbers of the report, read off at the end.
    monkeypatch.setattr(torch.Tensor, "item", lambda self: 0.0)
    report = evaluation.measure(torch.randn(B, C, device=cuda), batch(cuda)[1])
    assert set(report) == {"top1", "top5", "nll", "ece", "n"}
