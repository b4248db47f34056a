"""Foreign checkpoints load, and none runs code."""
import pytest
import torch

from models import create_model
from support.checkpoints import load_model
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
