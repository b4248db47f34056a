"""What the devices are told, without having them."""
import pytest
import torch

import train
from support.devices import amp_by_default, layout, mixed_precision, pick_device
from support.errors import UserError


def test_float32_is_float32_and_twice_the_same():
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = True, False
    pick_device("cpu")
    assert not torch.backends.cudnn.allow_tf32 and torch.backends.cudnn.deterministic


def test_on_mps_images_and_weights_stay_contiguous():
    """Batch norm's backward pass in channels_last is wrong there in many versions of torch."""
    assert layout(torch.device("mps")) == torch.contiguous_format
    assert {layout(torch.device(name)) for name in ("cpu", "cuda")} == {torch.channels_last}


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
