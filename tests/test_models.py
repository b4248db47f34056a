"""Shapes, parameter counts, the field's names, and the ViT block against PyTorch's own layer."""
import pytest
import torch
from torch import nn

from models import MODELS, Block, create_model, patch_size


@pytest.mark.parametrize("name", MODELS)
def test_forward_gives_logits_only(name):
    model = create_model(name, 7, 32)
    logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 7) and logits.isfinite().all()


@pytest.mark.parametrize("name, millions", [
    ("resnet8", 0.08), ("resnet14", 0.18), ("resnet20", 0.28), ("resnet32", 0.47),
    ("resnet44", 0.67), ("resnet56", 0.86), ("resnet110", 1.74), ("resnet8x4", 1.23),
    ("resnet32x4", 7.43), ("vit_nano", 0.25), ("vit_tiny", 5.4), ("vit_small", 21.4)])
def test_parameter_counts_are_the_fields(name, millions):
    count = sum(p.numel() for p in create_model(name, 100, 32).parameters()) / 1e6
    assert count == pytest.approx(millions, abs=0.006 if millions < 5 else 0.06)


def test_resnet_parameter_names_are_those_of_the_public_checkpoints():
    names = set(create_model("resnet20", 100).state_dict())
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer1.2.bn2.bias",
            "layer2.0.downsample.0.weight", "layer2.0.downsample.1.running_var",
            "layer3.2.conv2.weight", "fc.weight", "fc.bias"} <= names
    assert "layer1.0.downsample.0.weight" not in names


@pytest.mark.parametrize("name", ["resnet8", "resnet8x4"])
@pytest.mark.parametrize("size", [17, 64])
def test_a_resnet_takes_any_image_size(name, size):
    assert create_model(name, 5, size)(torch.randn(2, 3, size, size)).shape == (2, 5)


def test_the_vits_patches_follow_the_image_size():
    assert [patch_size(s) for s in (8, 16, 32, 64, 96, 128, 224)] == [4, 4, 4, 8, 12, 16, 16]
    assert create_model("vit_nano", 5, 64)(torch.randn(2, 3, 64, 64)).shape == (2, 5)
    with pytest.raises(ValueError, match="multiple of 8, not 30"):
        create_model("vit_nano", 5, 30)


def test_the_vit_block_is_pytorchs_pre_norm_layer():
    ours = Block(32, 4).eval()
    theirs = nn.TransformerEncoderLayer(32, 4, 128, 0.0, "gelu", batch_first=True,
                                        norm_first=True).eval()
    theirs.load_state_dict({
        "self_attn.in_proj_weight": ours.qkv.weight, "self_attn.in_proj_bias": ours.qkv.bias,
        "self_attn.out_proj.weight": ours.proj.weight, "self_attn.out_proj.bias": ours.proj.bias,
        "norm1.weight": ours.norm1.weight, "norm1.bias": ours.norm1.bias,
        "norm2.weight": ours.norm2.weight, "norm2.bias": ours.norm2.bias,
        "linear1.weight": ours.fc1.weight, "linear1.bias": ours.fc1.bias,
        "linear2.weight": ours.fc2.weight, "linear2.bias": ours.fc2.bias})
    x = torch.randn(3, 17, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_bad_names_and_class_counts_raise():
    with pytest.raises(ValueError, match="resnet21.*resnet20"):
        create_model("resnet21", 10)
    with pytest.raises(ValueError, match="at least 2"):
        create_model("resnet8", 1)


@pytest.mark.parametrize("name", ["resnet8", "vit_nano", "shufflenet_v2_x0_5"])
def test_logits_under_autocast_do_not_tie(name):
    network, x = create_model(name, 100, 16), torch.randn(64, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(x)
    top = logits.detach().topk(2).values
    assert logits.dtype == torch.float32 and not (logits.detach() == logits.bfloat16()).all()
    assert (top[:, 0] > top[:, 1]).all()
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
