"""Foreign checkpoints load, and none runs code."""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import data
from models import create_model
from support.checkpoints import load_model, weights_digest
from support.errors import UserError


@pytest.mark.parametrize("wrap", [
    lambda s: s, lambda s: {"model": s},
    lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}],
    ids=["bare", "model", "state_dict with module."])
def test_the_fields_checkpoint_forms_load(tmp_path, wrap):
    source = create_model("resnet8", 5)
    torch.save(wrap(source.state_dict()), tmp_path / "x.pt")
    loaded, _ = load_model(tmp_path / "x.pt", "resnet8")
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in loaded.state_dict().items())
    assert not loaded.training


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    import pickle

    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")
    (tmp_path / "bomb.pt").write_bytes(pickle.dumps({"model": Bomb()}))
    torch.save({"model": Bomb()}, tmp_path / "zip.pt")
    for name in ("bomb.pt", "zip.pt"):
        with pytest.raises(UserError, match=f"{name}: not a PyTorch checkpoint"):
            load_model(tmp_path / name, "resnet8")
    assert not (tmp_path / "ran").exists()


class Operations(TorchDispatchMode):
    """The names of all operations, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **kwargs or {})


def test_a_foreign_normalisation_moves_nothing_to_the_device_at_each_step(tmp_path):
    network = create_model("resnet8", 3)
    torch.save(dict(model=network.state_dict(), mean=(.1, .2, .7), std=(.6, .3, .9)), "x.pt")
    part = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    ours = data.Dataset(part, part, list("abc"), (.5, .4, .3), (.2, .3, .1), True)
    adapted, _ = load_model("x.pt", "resnet8", ours)
    assert weights_digest(adapted) == weights_digest(network)
    images = torch.zeros(2, 3, 32, 32)
    with Operations() as seen:
        adapted(images)
    assert seen.names[:3] == ["sub", "div", "convolution"]
