"""Networks from files: checkpoints of train.py, other people's state dicts, torchvision's weights.

A file may come from anywhere, so only tensors and plain types are unpickled, and every check ends
in a UserError of one line that begins with the file.
"""
import hashlib
import pickle
import warnings
from pathlib import Path

import torch
import torchvision

from models import check_size, create_model
from support.errors import UserError, as_user_error
from support.networks import TORCHVISION


def load_model(path, name=None, data=None):
    """(network in eval mode, checkpoint) from a file or a published network.

    path: a checkpoint of train.py; or a foreign state dict, bare or under "model" or "state_dict",
    with or without "module." before each name; or the name of a torchvision network, which stands
    for its published weights. name: the architecture; a foreign file needs it. data: the Dataset
    that the network will see. Its classes and image size are checked, and the network then takes
    images that are normalised by the data's mean and std, whatever it was trained with. checkpoint:
    the dict in the file, whole.
    Raises UserError for a file that is missing, damaged, no checkpoint, or that holds NaN, another
    network, or a network for other data.
    """
    path = Path(path)
    checkpoint = read_checkpoint(path)
    state = weights_in(path, checkpoint)
    name = architecture_in(path, checkpoint, name)
    size = checkpoint.get("image_size", 224 if name in TORCHVISION else 32)
    model, C = build(path, name, size, state)
    if data is not None:
        check_classes(path, checkpoint, C, data)
        check_image_size(path, checkpoint, name, size, data)
        adapt_normalisation(path, checkpoint, model, data)
    return model.eval(), checkpoint


def read_checkpoint(path):
    """What torch.load gives for the Path, or `published_checkpoint` where it names a network of
    torchvision. Raises UserError where there is nothing to load, or more than tensors and plain
    types."""
    if not path.is_file():
        if str(path) in TORCHVISION:
            return published_checkpoint(str(path))
        raise UserError(f"{path}: no such checkpoint, nor a network of torchvision.models")
    try:
        # torch warns of an unusual pickle protocol. Such a file loads, or is refused below.
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: not a PyTorch checkpoint of tensors and plain types; it was not "
                        "loaded")
    except Exception:
        # A damaged file can raise nearly anything.
        raise UserError(f"{path}: not a PyTorch checkpoint, or damaged (empty, cut off, or another "
                        "file type)")


def published_checkpoint(name):
    """The published weights of a torchvision network, in the form in which train.py saves one."""
    preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    size = preset.crop_size[0]
    with as_user_error(""):
        model = create_model(name, 1000, size, pretrained=True)
    return dict(architecture=name, image_size=size, dataset="imagenet", mean=tuple(preset.mean),
                std=tuple(preset.std), model=model.state_dict())


def weights_in(path, checkpoint):
    """{parameter: tensor} of a checkpoint, from whichever of its usual places."""
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: holds a {type(checkpoint).__name__}, not a state dict")
    inner = [checkpoint[k] for k in ("model", "state_dict") if isinstance(checkpoint.get(k), dict)]
    state = inner[0] if inner else checkpoint
    # DataParallel puts "module." before each name.
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def architecture_in(path, checkpoint, name):
    """The architecture that the checkpoint says, or else `name`. Raises UserError where there is
    neither, or they differ."""
    said = checkpoint.get("architecture")
    if name and said and name != said:
        raise UserError(f"{path}: holds a {said}, not a {name}")
    if not name and not said:
        raise UserError(f"{path}: does not say which network it is; name it with --model")
    return name or said


def build(path, name, size, state):
    """(network of these weights, C), with as many classes C as its last layer has."""
    with as_user_error(f"{path}: "):
        # The last parameter is the classifier's, with a number or a row for each class.
        *_, last = create_model(name, 2, size).state_dict()
        classifier = state.get(last)
        if not isinstance(classifier, torch.Tensor) or classifier.ndim == 0:
            raise ValueError(f"no classifier weights ({last}), so not a {name}")
        C = len(classifier)
        model = create_model(name, C, size)
    expected = model.state_dict()
    wrong = sorted(expected.keys() ^ state.keys())
    wrong = wrong or [k for k in expected if expected[k].shape != getattr(state[k], "shape", None)]
    if wrong:
        raise UserError(f"{path}: does not fit a {name}; first mismatches: {', '.join(wrong[:3])}")
    broken = [k for k in expected if not state[k].isfinite().all()]
    if broken:
        raise UserError(f"{path}: {broken[0]} holds NaN or infinity; train it again, or give "
                        "another file")
    model.load_state_dict(state)
    return model, C


def check_classes(path, checkpoint, C, data):
    """Raises UserError where the network's C classes are not those of the data."""
    if len(data.classes) != C:
        raise UserError(f"{path}: has {C} classes, the data has {len(data.classes)}")
    if checkpoint.get("classes", data.classes) != data.classes:
        raise UserError(f"{path}: was trained on other classes than the data's "
                        f"{data.classes[:3]}…")


def check_image_size(path, checkpoint, name, size, data):
    """Raises UserError where a network for `size` pixels cannot see the data's images."""
    side = data.test[0].shape[-1]
    with as_user_error(f"{path}: a {name} for {size} px, the images have {side}; give another "
                 "checkpoint or --image-size; "):
        # A student of train.py, which alone lists its classes, knows one size. The published
        # networks are used at many.
        if "classes" in checkpoint and size != side:
            raise ValueError("it was trained at no other")
        check_size(name, side, made_for=size)


def adapt_normalisation(path, checkpoint, model, data):
    """Make the network take images normalised by the data's mean and std, where it was trained with
    others: a hook then normalises them once more. Raises UserError where its own are no numbers."""
    theirs = torch.tensor([data.mean, data.std], dtype=torch.float64)                       # (2, 3)
    with as_user_error(f"{path}: mean and std: "):
        own = torch.tensor([checkpoint.get("mean", data.mean), checkpoint.get("std", data.std)],
                           dtype=torch.float64)
        if own.shape != theirs.shape or not (own.isfinite().all() and own[1].min() > 0):
            raise ValueError("not three numbers each")
    if torch.equal(own, theirs):
        return
    print(f"{path}: sees images normalised as it was trained, by mean and std {own.tolist()}, not "
          f"by the data's {theirs.tolist()}")
    # (x - own mean) / own std, of x in [0, 1], from (x - mean) / std.
    mean, std = (own[0] - theirs[0]) / theirs[1], own[1] / theirs[1]
    # Buffers, so that they move with the network once, and not to a GPU at every step. They are no
    # part of the weights, whose digest is kept.
    for name, value in (("own_mean", mean), ("own_std", std)):
        model.register_buffer(name, value.float().view(3, 1, 1), persistent=False)
    model.register_forward_pre_hook(lambda model, x: ((x[0] - model.own_mean) / model.own_std,))


def weights_digest(model):
    """SHA-256 of a network's weights and buffers, in hex."""
    weights = b"".join(v.cpu().numpy().tobytes() for v in model.state_dict().values())
    return hashlib.sha256(weights).hexdigest()


def is_finite(model):
    return all(value.isfinite().all() for value in model.state_dict().values())


def check_teacher(path, top1, C, part, advice):
    """Raises UserError where a teacher is hardly better than chance. path: where it comes from;
    top1: its accuracy on the `part`, in percent; C: classes; advice: what else might help."""
    # Twice chance means nothing for 2 classes.
    floor, words = min((200 / C, "twice chance"), (100 / C + 10, "ten points above chance"))
    if not top1 > floor:
        raise UserError(f"{path}: the teacher has {top1:.2f} % {part} top-1, no better than "
                        f"{floor:.2f} % ({words}); give another --teacher-checkpoint{advice}")
