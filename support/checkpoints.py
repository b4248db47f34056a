"""Networks from files: checkpoints of train.py, other people's state dicts, torchvision's weights.

A file may come from anywhere, so only tensors and plain types are unpickled, and every check ends
in a UserError of one line that begins with the file.
"""
import contextlib
import hashlib
import os
import pickle
import re
import textwrap
import warnings
from pathlib import Path

import torch
import torchvision

from models import check_size, create_model
from support.errors import UserError, as_user_error
from support.networks import TORCHVISION, as_published

# Where trainers keep the weights in a file; "ema" is their running mean.
PLACES = "model", "state_dict", "model_state_dict", "net", "state_dict_ema", "model_ema", "ema"
# What torch.compile, DataParallel and DistributedDataParallel add to the names.
WRAPPERS = re.compile(r"\b(_orig_mod|module)\.")


def load_model(path, name=None, data=None):
    """(network in eval mode, checkpoint) from a file or a published network.

    path: a checkpoint of train.py, or a run's folder, which stands for its last.pt; or a foreign
    state dict, bare or in one of PLACES, whatever WRAPPERS are in its names; or the name of a
    torchvision network, which stands for its published weights. name: the architecture; a foreign
    file needs it. data: the Dataset that the network will see. Its classes and image size are
    checked, and the network then takes images that are normalised by the data's mean and std,
    whatever it was trained with. checkpoint: the dict in the file, whole.
    Raises UserError for a file that is missing, damaged, no checkpoint, or that holds NaN, another
    network, a network for other data, or other than real, dense numbers.
    """
    path = Path(path)
    path = path / "last.pt" if path.is_dir() else path
    checkpoint = read_checkpoint(path)
    state = weights_in(path, checkpoint)
    said = checkpoint.get("architecture")
    if name and said and name != said:
        raise UserError(f"{path}: holds a {said}, not a {name}; name it, with --teacher or --model")
    if not name and not said:
        raise UserError(f"{path}: does not say which network it is; name it with --model")
    name = name or said
    size = checkpoint.get("image_size", 224 if name in TORCHVISION else 32)
    model, C = build(path, name, size, state)
    if "classes" not in checkpoint:
        # Not of train.py, so it was trained with what networks.create_torchvision takes out.
        model = as_published(name, model)
    if data is not None:
        first, *others = places_in(checkpoint) or [None]
        if others:
            print(f"{path}: the weights under {first!r} are taken, not those under {others[0]!r}; "
                  "for these save them alone")
        if len(data.classes) != C:
            raise UserError(f"{path}: has {C} classes, the data has {len(data.classes)}")
        if checkpoint.get("classes", data.classes) != data.classes:
            raise UserError(f"{path}: was trained on other classes than {data.classes[:3]}…")
        side = data.test[0].shape[-1]
        with as_user_error(f"{path}: a {name} for {size} px, the images have {side}; give another "
                           "checkpoint or --image-size; "):
            # A student of train.py, which alone lists its classes, knows one size. The published
            # networks are used at many.
            if "classes" in checkpoint and size != side:
                raise ValueError("it was trained at no other")
            check_size(name, side, made_for=size)
        adapt_normalisation(path, checkpoint, model, data)
    return model.eval(), checkpoint


def read_checkpoint(path):
    """What torch.load gives for the Path, or `published_checkpoint` where it names a network of
    torchvision. Raises UserError where there is nothing to load, or more than tensors and plain
    types."""
    if not path.is_file():
        if str(path) in TORCHVISION:
            return published_checkpoint(str(path))
        # The folder above the seeds of a row.
        runs = sorted(path.parent.glob("seed*/last.pt"))
        near = f"; nearest: {runs[0]}" if runs else ""
        raise UserError(f"{path}: no such checkpoint, nor a network of torchvision.models{near}")
    try:
        # torch warns of an unusual pickle protocol. Such a file loads, or is refused below.
        with (warnings.catch_warnings(action="ignore"),
              torch.serialization.safe_globals(STAND_INS)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        holds = ""
        with contextlib.suppress(Exception), torch.serialization.safe_globals(STAND_INS):
            unknown = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
            holds = f" (it holds {', '.join(unknown[:3])})"
        raise UserError(f"{path}: not a PyTorch checkpoint of tensors and plain types{holds}; it "
                        "was not loaded; give a file of the state_dict() alone")
    except Exception:
        # A damaged file can raise nearly anything.
        raise UserError(f"{path}: not a PyTorch checkpoint, or damaged (empty, cut off, "
                        "TorchScript, or another file type)")


class StandIn:
    """In place of a thing beside the weights that nothing here asks for: whatever the file would
    make of it, nothing happens."""

    def __init__(self, *given):
        pass
    __setstate__ = __init__


# The things that people save beside weights, by their names in a file.
STAND_INS = [(StandIn, name) for name in (
    "numpy.dtype", "numpy.ndarray", "argparse.Namespace", "types.SimpleNamespace",
    "datetime.datetime", "datetime.timedelta", "torch.torch_version.TorchVersion",
    *(f"numpy.{core}.multiarray.{what}" for core in ("core", "_core")
      for what in ("scalar", "_reconstruct")),
    *(f"pathlib{local}.{kind}Path" for local in ("", "._local") for kind in ("Posix", "Windows")))]


def published_checkpoint(name):
    """The published weights of a torchvision network, in the form in which train.py saves one."""
    preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    size = preset.crop_size[0]
    with as_user_error(""):
        model = create_model(name, 1000, size, pretrained=True)
    return dict(architecture=name, image_size=size, dataset="imagenet", mean=tuple(preset.mean),
                std=tuple(preset.std), model=model.state_dict())


def places_in(checkpoint):
    """Those of PLACES under which a checkpoint has tensors."""
    return [place for place in PLACES if isinstance(inner := checkpoint.get(place), dict)
            and any(isinstance(value, torch.Tensor) for value in inner.values())]


def weights_in(path, checkpoint):
    """{parameter: tensor} of a checkpoint, from whichever of its usual places. Raises UserError
    where it is no dict."""
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: holds a {type(checkpoint).__name__}, not a state dict")
    place, = places_in(checkpoint)[:1] or [None]
    state = {WRAPPERS.sub("", str(key)): value
             for key, value in checkpoint.get(place, checkpoint).items()}
    # How many weights AveragedModel has averaged.
    state.pop("n_averaged", None)
    # Wrappers of other names, such as Lightning's, stand before all of them.
    common = os.path.commonprefix([*state]).rpartition(".")[0]
    return {key.removeprefix(f"{common}."): value for key, value in state.items()}


def build(path, name, size, state):
    """(network of these weights, C), with as many classes C as its last layer has."""
    with as_user_error(f"{path}: "):
        # The last parameter is the classifier's, with a number or a row for each class.
        *_, last = create_model(name, 2, size).state_dict()
        classifier = state.get(last)
        if not isinstance(classifier, torch.Tensor) or classifier.ndim == 0:
            raise ValueError(f"no classifier weights ({last}), so not a {name}; first names: "
                             f"{', '.join([*state][:3])}")
        C = len(classifier)
        model = create_model(name, C, size)
    for key, value in model.state_dict().items():
        # Complex numbers, or integers without their scale, would be converted without a word.
        dtype = getattr(state.get(key), "dtype", value.dtype)
        if value.is_floating_point() and not dtype.is_floating_point:
            raise UserError(f"{path}: {key} holds {dtype}, not weights; give a file of real "
                            "numbers that are not quantised")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{path}: does not fit a {name} ({textwrap.shorten(str(error), 300)})")
    broken = [key for key, value in model.state_dict().items() if not value.isfinite().all()]
    if broken:
        raise UserError(f"{path}: {broken[0]} holds NaN or infinity; train it again, or give "
                        "another file")
    return model, C


def adapt_normalisation(path, checkpoint, model, data):
    """Make the network take images normalised by the data's mean and std, where it was trained with
    others: a hook then normalises them once more. Raises UserError where its own are no numbers."""
    theirs = torch.tensor([data.mean, data.std], dtype=torch.float64)                       # (2, 3)
    with as_user_error(f"{path}: mean and std: "):
        own = torch.tensor([checkpoint.get("mean", data.mean), checkpoint.get("std", data.std)],
                           dtype=torch.float64)
        if own.shape != theirs.shape or not (own.isfinite().all() and own[1].min() > 0):
            raise ValueError("not three numbers each")
    # Glyphs that another machine renders may differ in a few pixels.
    if torch.allclose(own, theirs, rtol=0, atol=1e-4):
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


def check_finite(who, logits):
    """Raises UserError where a row of the logits (N, C) is not finite. who: whose they are."""
    broken = (~logits.isfinite().all(1)).nonzero().flatten().tolist()
    if broken:
        raise UserError(f"{who}: the outputs on {len(broken)} of {len(logits)} images are not "
                        f"finite, first on number {broken[0] + 1}; give another checkpoint, or "
                        "train it with a smaller --lr")


def is_finite(model):
    return all(value.isfinite().all() for value in model.state_dict().values())


def near_chance(C):
    """A top-1 in percent that a network of C classes which has learnt little may have."""
    # Twice chance means nothing for 2 classes.
    return min(200 / C, 100 / C + 10)


def known_top1(checkpoint, s, data):
    """The top-1 in the checkpoint of a teacher that train.py trained by itself, if it was measured
    on the same images of this Dataset as are measured by the settings s; otherwise None. It saves
    a pass over large photographs."""
    same = data.digests and list(checkpoint.get("data") or ()) == list(data.digests)
    known = same and checkpoint.get("evaluate") == s.evaluate and not s.teacher_checkpoint
    return checkpoint["top1"] if known else None


def check_teacher(s, path, top1, C):
    """Raises UserError where a teacher is hardly better than chance. path: where it comes from;
    top1: its accuracy on the measured part, in percent; C: classes."""
    if not top1 > near_chance(C):
        raise UserError(f"{path}: the teacher has {top1:.2f} % {s.evaluate} top-1, no better than "
                        f"{near_chance(C):.2f} %, near chance; give another --teacher-checkpoint, "
                        "or more --epochs where it is trained first")
