"""torchvision's networks under our interface, their weights, and the questions asked beforehand."""
import pytest
import torch
import torchvision

from models import MODELS, check_name, check_size, create_model
from support.checkpoints import load_model
from support.networks import TORCHVISION

FAMILIES = ["resnet18", "mobilenet_v3_small", "efficientnet_b0", "vgg11", "alexnet", "densenet121",
            "squeezenet1_1", "shufflenet_v2_x0_5", "vit_b_16", "swin_t", "convnext_tiny",
            "maxvit_t"]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_parameter_of_a_torchvision_network_belongs_to_its_classifier(name):
    """On which reading checkpoints and replacing the last layer build."""
    with torch.device("meta"):
        model, other = create_model(name, 7), create_model(name, 9).state_dict()
        assert model(torch.zeros(2, 3, 224, 224)).shape == (2, 7)
    state = model.state_dict()
    different = [key for key in state if state[key].shape != other[key].shape]
    *_, last = state
    assert last in different and len(state[last]) == 7
    assert {key.rpartition(".")[0] for key in different} == {last.rpartition(".")[0]}


def test_the_names_are_all_of_torchvisions_classifiers_that_give_logits():
    assert len(TORCHVISION) >= 78 and {*FAMILIES, "regnet_y_128gf", "vit_h_14"} <= set(TORCHVISION)
    assert not {*TORCHVISION} & {*MODELS, "googlenet", "inception_v3", "fcn_resnet50", "raft_large"}
    with pytest.raises(ValueError, match="inception_v3: returns more than logits"):
        create_model("inception_v3", 10)
    with pytest.raises(ValueError, match="resnet51: unknown network; nearest: .*resnet50, "):
        check_name("resnet51")


def test_sizes_that_a_network_does_not_take():
    for name, size in (("resnet8", 3), ("resnet18", 20), ("vit_nano", 16), ("vit_b_16", 224),
                       ("regnet_x_400mf", 32), ("vgg11", 32)):
        check_size(name, size)
    for name, size, more in (("vit_b_16", 64, {}), ("vgg11", 16, {}), ("vit_nano", 30, {}),
                             ("resnet18", 32, dict(images=1)), ("vit_nano", 64, dict(made_for=16))):
        with pytest.raises(ValueError):
            check_size(name, size, **more)


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "squeezenet1_1"])
def test_pretrained_weights_are_loaded_and_the_last_layer_replaced(published, name):
    state = published(name)
    *_, last = state
    for classes, own in ((1000, True), (5, False)):
        loaded = create_model(name, classes, 64, pretrained=True).state_dict()
        assert loaded.keys() == state.keys() and len(loaded[last]) == classes
        layer = last.rpartition(".")[0] + "."
        assert all(torch.equal(value, state[key]) for key, value in loaded.items()
                   if own or not key.startswith(layer))


@pytest.mark.parametrize("name", ["squeezenet1_0", "squeezenet1_1"])
def test_squeezenets_logits_are_not_cut_off_at_0(published, name, tmp_path):
    state = published(name)
    images = torch.randn(2, 3, 32, 32)
    for pretrained in (False, True):
        student = create_model(name, 5, 32, pretrained)
        assert student.state_dict().keys() == state.keys()
        with torch.no_grad():
            student.classifier[1].bias -= 100
        logits = student.eval()(images)
        assert (logits < 0).all()
        logits.sum().backward()
        assert student.classifier[1].bias.grad.any()
    # The student's own file too; weights that were trained with the ReLU keep it.
    own = dict(architecture=name, classes=list("abcde"), model=student.state_dict())
    torch.save(own, tmp_path / "own.pt")
    torch.save(student.state_dict(), tmp_path / "foreign.pt")
    assert torch.equal(load_model(tmp_path / "own.pt")[0](images), logits)
    assert not load_model(tmp_path / "foreign.pt", name)[0](images).any()
    theirs = torchvision.models.get_model(name)
    theirs.load_state_dict(state)
    assert torch.equal(load_model(name)[0](images), theirs.eval()(images))


@pytest.mark.parametrize("content", [None, b"", b"<html>404</html>"])
def test_weights_that_cannot_be_had_name_the_file_and_the_folder(published, tmp_path, content):
    file = "shufflenetv2_x0.5-f707e7126e.pth"
    if content is not None:
        (tmp_path / "torch/hub/checkpoints").mkdir(parents=True)
        (tmp_path / "torch/hub/checkpoints" / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"shufflenet_v2_x0_5: cannot load {file} .*into "
                                         f"{tmp_path / 'torch/hub/checkpoints'}") as caught:
        create_model("shufflenet_v2_x0_5", 5, pretrained=True)
    assert "\n" not in str(caught.value)
