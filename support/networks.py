"""The classifiers of torchvision.models under the interface of models.py, and what is asked about
a network before it is used: whether its name exists, and which images it takes.
"""
import functools
from pathlib import Path

import torch
import torchvision
from torch import nn

from support.errors import nearest


class LastLinear(nn.Linear):
    """Keeps the logits in float32: in bfloat16 over 1 % of rows tie at the top, and argmax and the
    swap become arbitrary. Its parameters are named as those of nn.Linear."""

    def forward(self, x):
        # Tensors on "meta", which have no numbers, know no autocast; check_size works with them.
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


# Their forward returns more than logits in training mode.
NOT_LOGITS = ("googlenet", "inception_v3")
TORCHVISION = tuple(name for name in torchvision.models.list_models(module=torchvision.models)
                    if name not in NOT_LOGITS)
SQUEEZENETS = "squeezenet1_0", "squeezenet1_1"


def create_torchvision(name, num_classes, image_size, pretrained):
    """A network of TORCHVISION for `num_classes` classes.

    pretrained: with ImageNet weights, and a new last layer unless num_classes is 1,000. image_size:
    side in pixels, which matters only to weights that were made for one size. A linear last layer
    becomes a LastLinear with the same parameters, and a SqueezeNet loses the ReLU behind its last
    layer. Raises ValueError for weights of another image size, or that cannot be had.
    """
    model = torchvision.models.get_model(name, num_classes=num_classes)
    # fc, head, classifier.6: the owner of the last parameter.
    last = [*model.state_dict()][-1].rpartition(".")[0]
    layer = model.get_submodule(last)
    if pretrained:
        model = published(name)
        made_for = getattr(model, "image_size", image_size)
        if made_for != image_size:
            raise ValueError(f"{name}: its weights are for images of {made_for} pixels")
        if num_classes == 1000:
            layer = model.get_submodule(last)
    # SqueezeNet's last layer is a convolution.
    if isinstance(layer, nn.Linear):
        # On "meta" it neither draws random numbers nor fills weights, which are replaced anyway.
        own = LastLinear(layer.in_features, layer.out_features, device="meta")
        own.weight, own.bias, layer = layer.weight, layer.bias, own
    model.set_submodule(last, layer)
    if name in SQUEEZENETS:
        # Where all logits of an image fall below 0, a ReLU makes them tie, and passes no gradient
        # by which they could rise again.
        model.classifier[2] = nn.Identity()
    return model


def as_published(name, model):
    """The network as torchvision defines it, for weights that were trained so."""
    if name in SQUEEZENETS:
        model.classifier[2] = nn.ReLU()
    return model


def published(name):
    """A network of TORCHVISION with its best ImageNet weights, which are downloaded once. Raises
    ValueError, with the way to put them there by hand, where they cannot be had."""
    weights = torchvision.models.get_model_weights(name).DEFAULT
    try:
        return torchvision.models.get_model(name, weights=weights)
    except Exception as error:
        # No network, no space, or a damaged file, which can raise nearly any exception.
        reason, folder = str(error).split("\n")[0], Path(torch.hub.get_dir()) / "checkpoints"
        raise ValueError(f"{name}: cannot load {Path(weights.url).name} ({reason}); put a whole "
                         f"one, from {weights.url}, into {folder}, or give --no-pretrained")


def check_name(name, ours):
    """Raises ValueError, with the nearest names, unless `name` is among `ours` or TORCHVISION."""
    if name in NOT_LOGITS:
        raise ValueError(f"{name}: returns more than logits in training; choose another network")
    if name not in ours and name not in TORCHVISION:
        which = nearest(name, [*ours, *TORCHVISION], 4) or f"choose among {', '.join(ours)}"
        raise ValueError(f"{name}: unknown network; {which}, or a classifier of torchvision.models")


@functools.cache
def check_size(create_model, name, image_size, images=2, made_for=None):
    """Raises ValueError where a network does not take so many images of this size in training.

    create_model: builds it. image_size: side in pixels. made_for: the size that the network is
    built for, if that is another. Works on tensors without numbers, so it costs no arithmetic.
    """
    with torch.device("meta"):
        try:
            model = create_model(name, 2, made_for or image_size)
        except NotImplementedError:
            # RegNets look at numbers when they are built.
            with torch.device("cpu"):
                model = create_model(name, 2, image_size).to("meta")
        try:
            model(torch.zeros(images, 3, image_size, image_size))
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{name} does not take {images} images of {image_size} pixels "
                             f"({reason})")
