"""Foreign checkpoints load, or are refused in a line that says why, and none runs code."""
import argparse
import datetime
import pathlib

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

import data
from models import create_model
from support.checkpoints import load_model, weights_digest
from support.errors import UserError


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


class Tuple(tuple):
    """A type that no checkpoint may hold."""


@pytest.mark.parametrize("wrap", {
    "bare": lambda s: s, "model": lambda s: {"model": s},
    "state_dict with module.": lambda s: {"state_dict": prefixed("module.", s)},
    "model_state_dict": lambda s: {"epoch": 3, "model_state_dict": s, "loss": 0.5},
    "ema": lambda s: {"ema": s, "step": 7},
    "net, compiled": lambda s: {"net": prefixed("_orig_mod.", s), "epoch": 3},
    "compiled before DDP": lambda s: {"state_dict": prefixed("module._orig_mod.", s)},
    "DDP before compiled": lambda s: prefixed("_orig_mod.module._orig_mod.module.", s),
    "a part of it compiled": lambda s: {
        k.replace("layer1.", "layer1._orig_mod."): v for k, v in s.items()},
    "a part of it in parallel": lambda s: {
        k.replace("layer2.", "layer2.module."): v for k, v in s.items()},
    "Lightning": lambda s: {"state_dict": prefixed("net._orig_mod.", s), "epoch": 3},
    "a configuration under model": lambda s: {"model": {"depth": 8}, "state_dict": s},
    "state_dict_ema": lambda s: {"state_dict_ema": s, "arch": "resnet8"},
    "model_ema": lambda s: {"model_ema": prefixed("module.", s) | {"n_averaged": torch.tensor(7)}},
    "NumPy beside it": lambda s: {
        "net": s, "acc": np.float64(91.5), "epoch": np.int64(3), "rng": np.random.get_state(),
        "mean loss": np.float32(0.1), "names": np.array(["a", "b"]), "done": np.bool_(True)},
    "plain things beside it": lambda s: {
        "model": s, "args": argparse.Namespace(lr=0.1, out=pathlib.Path("runs")),
        "date": datetime.datetime(2025, 1, 2), "took": datetime.timedelta(3),
        "torch": torch.__version__, "python": (1, "a", {2}, None, 3.5)}}.items(),
    ids=lambda item: item[0])
def test_the_fields_checkpoint_forms_load(tmp_path, wrap):
    source = create_model("resnet8", 5)
    torch.save(wrap[1](source.state_dict()), tmp_path / "x.pt")
    loaded, _ = load_model(tmp_path / "x.pt", "resnet8")
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in loaded.state_dict().items())
    assert not loaded.training


def test_averaged_weights_load_as_torch_saves_them(tmp_path):
    source = AveragedModel(create_model("resnet8", 5))
    torch.save({"model_ema": source.state_dict()}, tmp_path / "x.pt")
    loaded, _ = load_model(tmp_path / "x.pt", "resnet8")
    assert torch.equal(loaded.fc.weight, source.module.fc.weight)


def test_which_of_two_sets_of_weights_is_taken_is_said(tmp_path, colors, capsys):
    source, mean = (create_model("resnet8", 3).state_dict() for _ in range(2))
    torch.save({"state_dict_ema": mean, "state_dict": source}, tmp_path / "x.pt")
    loaded, _ = load_model(tmp_path / "x.pt", "resnet8", data.load("folder", colors, 32))
    assert torch.equal(loaded.fc.weight, source["fc.weight"])
    assert "under 'state_dict' are taken, not those under 'state_dict_ema'" in (
        capsys.readouterr().out)


@pytest.mark.parametrize("kind, change, error", [
    ("half", torch.Tensor.half, 1e-3), ("bfloat16", torch.Tensor.bfloat16, 1e-2),
    ("double", torch.Tensor.double, 0), ("parameter", torch.nn.Parameter, 0),
    ("float8_e4m3", lambda w: w.to(torch.float8_e4m3fn), 0.07),
    ("float8_e5m2", lambda w: w.to(torch.float8_e5m2), 0.13)])
def test_real_numbers_of_any_precision_are_taken(tmp_path, kind, change, error):
    state = create_model("resnet8", 5).state_dict()
    weight = state["fc.weight"]
    torch.save(state | {"fc.weight": change(weight)}, tmp_path / "x.pt")
    loaded = load_model(tmp_path / "x.pt", "resnet8")[0].state_dict()["fc.weight"]
    assert loaded.dtype == torch.float32 and loaded.layout == torch.strided
    torch.testing.assert_close(loaded, weight, rtol=error, atol=1e-3 if error else 0)


@pytest.mark.parametrize("change, why", [
    (lambda w: w.to(torch.complex64), "holds torch.complex64, not weights"),
    (lambda w: w.to(torch.int8), "holds torch.int8, not weights"),
    (lambda w: w > 0, "holds torch.bool, not weights"),
    (lambda w: torch.zeros(w.shape, dtype=torch.uint8).view(torch.bits8), "holds torch.bits8"),
    (lambda w: torch.quantize_per_tensor(w, 1e-3, 0, torch.qint32), "holds torch.qint32, not w"),
    # Infinite in float32.
    (lambda w: w.double() * 1e300, "holds NaN or infinity"),
    (lambda w: (w * float("nan")).to(torch.float8_e4m3fn), "holds NaN or infinity")])
def test_what_is_no_real_number_is_refused_by_name(tmp_path, change, why):
    state = create_model("resnet8", 5).state_dict()
    torch.save(state | {"fc.weight": change(state["fc.weight"])}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=f"x.pt: fc.weight {why}") as refusal:
        load_model(tmp_path / "x.pt", "resnet8")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("change", [
    lambda w: w.to("meta"), torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr,
    lambda w: torch.nested.nested_tensor([torch.ones(3), torch.ones(2)])])
def test_what_cannot_be_copied_is_refused(tmp_path, change):
    state = create_model("resnet8", 5).state_dict()
    torch.save(state | {"fc.weight": change(state["fc.weight"])}, tmp_path / "x.pt")
    # Some versions of torch do not load them.
    with pytest.raises(UserError, match="x.pt: (does not fit a resnet8|not a PyTorch)") as refusal:
        load_model(tmp_path / "x.pt", "resnet8")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("content, why", [
    (lambda s: {"model": s, "odd": Tuple([1])}, r"it holds test_checkpoints\.Tuple\)"),
    (lambda s: create_model("resnet8", 5), r"it holds .*models\.BasicBlock"),
    (lambda s: {"weights": s}, "no classifier weights .*first names: weights"),
    (lambda s: s | {"fc.extra": torch.zeros(1)}, 'does not fit a resnet8 .*"fc.extra"'),
    (lambda s: s | {"conv1.weight": torch.zeros(4)}, "does not fit a resnet8 .*conv1.weight")])
def test_a_refusal_says_what_was_in_the_way(tmp_path, content, why):
    torch.save(content(create_model("resnet8", 5).state_dict()), tmp_path / "x.pt")
    with pytest.raises(UserError, match=f"x.pt: .*{why}"):
        load_model(tmp_path / "x.pt", "resnet8")


def test_a_type_of_numpy_in_a_file_is_not_made(tmp_path):
    """One that says of itself that it holds addresses would have NumPy follow them."""
    class Forged:
        def __reduce__(self):
            return np.dtype, ("f8", False, True), (3, "<", None, None, None, -1, -1, 1)
    state = create_model("resnet8", 5).state_dict()
    torch.save({"model": state, "odd": Forged()}, tmp_path / "x.pt")
    assert not isinstance(load_model(tmp_path / "x.pt", "resnet8")[1]["odd"], np.dtype)


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
