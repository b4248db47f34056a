"""A network as an ONNX file, for programs without torch."""
import json
import warnings
from pathlib import Path

import torch
from torch import nn

from data import DATASETS, PHOTOGRAPHS
from models import check_size
from support.checkpoints import load_model
from support.errors import UserError, as_user_error
from support.files import atomic_write
from support.networks import TORCHVISION
from support.photographs import stored_side


class FromRGB(nn.Module):
    """Logits (N, C) of RGB images (N, 3, S, S) in [0, 1], by a network that takes normalised ones.
    mean, std: those of red, green and blue in [0, 1]."""

    def __init__(self, model, mean, std):
        super().__init__()
        self.model = model
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32).view(1, 3, 1, 1))

    def forward(self, images):
        return self.model((images - self.mean) / self.std)


def export(checkpoint, path, name=None, dataset=None, size=None):
    """Write the network of a checkpoint file into the one file `path`. Returns lines that say how
    to use it.

    name, dataset, size: architecture, data set, and side of its images in pixels, where the
    checkpoint does not say them. Raises UserError where they are missing, packages are, `path` is
    there, or torch.onnx cannot export the network.
    """
    path = Path(path)
    if path.exists() or not path.parent.is_dir():
        reason = "is there; remove it" if path.exists() else f"there is no folder {path.parent}"
        raise UserError(f"--export {path}: {reason}, or give another name")
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise UserError("--export: torch.onnx needs more packages; pip install onnx onnxscript")
    model, about = load_model(checkpoint, name)
    with as_user_error(f"{checkpoint}: "):
        name, dataset = about.get("architecture", name), about.get("dataset", dataset)
        facts = DATASETS.get(dataset)
        mean, std = (about.get(key, getattr(facts, key, None)) for key in ("mean", "std"))
        if None in (facts, mean, std):
            raise ValueError("does not say how its images were normalised; give --dataset")
        # As eval.py looks at images, and load_model builds a network, without a size in the file.
        theirs = name in TORCHVISION
        side = about.get("image_size", size or (224 if theirs and facts.area else facts.side))
        if size not in (None, side):
            raise ValueError(f"is for {side} px; leave out --image-size {size}")
        check_size(name, side, made_for=about.get("image_size", 224 if theirs else 32))
        wrapped = FromRGB(model, mean, std).eval()
    try:
        # torch.onnx warns of its own deprecations, and of names it does not need.
        with warnings.catch_warnings(action="ignore"):
            program = torch.onnx.export(
                wrapped, (torch.zeros(2, 3, side, side),), dynamo=True, verbose=False,
                input_names=["images"], output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("N")},))
        proto, classes = program.model_proto, about.get("classes", [])
        if classes:
            proto.metadata_props.add(key="classes", value=json.dumps(classes))
        content = proto.SerializeToString()
    except Exception as error:
        # It can raise nearly anything.
        raise UserError(f"--export: torch.onnx cannot export this {name} "
                        f"({str(error).splitlines()[0]})")
    if isinstance(program.model.graph.inputs[0].shape[0], int):
        raise UserError(f"--export: torch.onnx makes of a {name} a file for batches of 2 only")
    with atomic_write(path) as file:
        file.write(content)
    whole = stored_side(side) if dataset in PHOTOGRAPHS else side
    crop = f", of which the middle {side} x {side}" if whole != side else ""
    order = f": {', '.join(classes[:5])}{', …' * (len(classes) > 5)}" if classes else ""
    return (f"{path}: {name}, ONNX opset {program.model.opset_imports['']}, one file\n"
            f"takes     images (N, 3, {side}, {side}), any N: RGB from 0 to 1, float32\n"
            f"gives     logits (N, {program.model.graph.outputs[0].shape[1]}){order}\n"
            f"{'          its metadata lists the classes, as JSON' + chr(10) if classes else ''}"
            "prepare   as eval.py does: turned upright as EXIF says, on white where transparent, "
            f"the middle\n          square resized to {whole} x {whole} pixels (bilinear){crop};\n"
            "          divided by 255, not normalised: the file does that")
