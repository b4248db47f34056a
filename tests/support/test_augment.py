"""Each operation of the views against Pillow, pixel by pixel, or against torchvision."""
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import transforms

from support import augment


def to_pil(images):
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]


def from_pil(images):
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])


def affine(*matrix):
    return lambda image, v: image.transform(image.size, Image.Transform.AFFINE,
                                            [m(v) if callable(m) else m for m in matrix])


PILLOW = {
    "autocontrast": lambda image, v: ImageOps.autocontrast(image),
    "brightness": lambda image, v: ImageEnhance.Brightness(image).enhance(v),
    "color": lambda image, v: ImageEnhance.Color(image).enhance(v),
    "contrast": lambda image, v: ImageEnhance.Contrast(image).enhance(v),
    "sharpness": lambda image, v: ImageEnhance.Sharpness(image).enhance(v),
    "equalize": lambda image, v: ImageOps.equalize(image),
    "identity": lambda image, v: image,
    "posterize": lambda image, v: ImageOps.posterize(image, int(v)),
    "solarize": lambda image, v: ImageOps.solarize(image, v),
    "rotate": lambda image, v: image.rotate(v),
    "shear_x": affine(1, lambda v: v, 0, 0, 1, 0),
    "shear_y": affine(1, 0, 0, lambda v: v, 1, 0),
    "translate_x": affine(1, 0, lambda v: 32 * v, 0, 1, 0),
    "translate_y": affine(1, 0, 0, 0, 1, lambda v: 32 * v),
}
RANGES = dict(brightness=(.05, .95), color=(.05, .95), contrast=(.05, .95), sharpness=(.05, .95),
              posterize=(4, 8), solarize=(0, 256), rotate=(-30, 30), shear_x=(-.3, .3),
              shear_y=(-.3, .3), translate_x=(-.3, .3), translate_y=(-.3, .3))


def test_the_operations_and_their_ranges_are_the_papers():
    assert set(augment.OPS) == set(PILLOW) and len(PILLOW) == 14
    for name, expected in RANGES.items():
        assert augment.OPS[name][:2] == expected


@pytest.mark.parametrize("name", PILLOW)
def test_each_operation_is_pillows(images, name):
    low, high, _ = augment.OPS[name]
    u = torch.rand(len(images))
    ours = augment.randaugment(images, torch.full((len(images),), list(augment.OPS).index(name)), u)
    values = (low + (high - low) * u).tolist()
    theirs = from_pil([PILLOW[name](image, v) for image, v in zip(to_pil(images), values)])
    assert torch.equal(ours, theirs)
    assert name == "identity" or not torch.equal(ours, images)


def test_mixed_operations_reach_their_own_images(images):
    ops, u = torch.randint(len(augment.OPS), (len(images),)), torch.rand(len(images))
    together = augment.randaugment(images, ops, u)
    for i in range(len(images)):
        alone, = augment.randaugment(images[i:i + 1], ops[i:i + 1], u[i:i + 1])
        assert torch.equal(together[i], alone)


def test_cutout_is_pillows_rectangle(images):
    side, centre = 16 * torch.rand(len(images)), 32 * torch.rand(len(images), 2)
    expected = to_pil(images)
    for image, v, (x, y) in zip(expected, side.tolist(), centre.tolist()):
        x, y = int(max(0, x - v / 2)), int(max(0, y - v / 2))
        ImageDraw.Draw(image).rectangle((x, y, min(32, x + v), min(32, y + v)), (125, 123, 114))
    assert torch.equal(augment.cutout(images, side, centre), from_pil(expected))


def test_the_mask_of_a_cutout_is_made_where_the_images_are():
    """Only numbers of the squares go there, not a mask of every pixel."""
    moved = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            if "copy" in str(function) and out.is_meta and not args[0].is_meta:
                moved.append(out.numel())
            return out
    images = torch.zeros(8, 3, 64, 64, dtype=torch.uint8, device="meta")
    with Copies():
        augment.cutout(images, torch.rand(8), torch.rand(8, 2))
    assert moved and max(moved) <= 16


def test_the_weak_view_is_a_padded_crop_and_a_mirror(images):
    offset, mirror = torch.randint(-4, 5, (len(images), 2)), torch.rand(len(images)) < 0.5
    expected = []
    for image, (x, y), flip in zip(to_pil(images), offset.tolist(), mirror.tolist()):
        image = ImageOps.expand(image, 4).crop((4 + x, 4 + y, 36 + x, 36 + y))
        expected.append(ImageOps.mirror(image) if flip else image)
    assert torch.equal(augment.crop_and_flip(images, offset, mirror), from_pil(expected))


def test_the_weak_view_of_photographs_is_torchvisions_resized_crop():
    images = torch.randint(256, (40, 3, 37, 37), dtype=torch.uint8)
    box = augment.draw_box(40, 37, 0.08, torch.Generator().manual_seed(0))
    mirror = torch.arange(40) % 2 == 1
    ours = augment.resized_crop(images, box, mirror, 32)
    for image, (x, y, w, h), flip, view in zip(images, box.int().tolist(), mirror, ours):
        theirs = transforms.functional.resized_crop(image, y, x, h, w, [32, 32], antialias=False)
        theirs = theirs.flip(2) if flip else theirs
        assert (view.int() - theirs.int()).abs().max() <= 1
    assert ours.dtype == torch.uint8 and ours.shape == (40, 3, 32, 32)


def test_its_boxes_are_drawn_as_torchvision_draws_them():
    """Means and spreads of x, y, width and height over many draws."""
    n, side = 4000, 256
    ours = augment.draw_box(n, side, 0.08, torch.Generator().manual_seed(0))
    assert (ours == ours.round()).all() and ours[:, :2].min() >= 0 and ours[:, 2:].min() > 0
    assert (ours[:, :2] + ours[:, 2:]).max() <= side
    image, draw = torch.empty(3, side, side), transforms.RandomResizedCrop.get_params
    theirs = torch.tensor([draw(image, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(n)])
    # It gives y, x, height, width.
    theirs = theirs[:, [1, 0, 3, 2]]
    for statistic, tolerance in ((torch.mean, 4), (torch.std, 3)):
        difference = statistic(ours.double(), 0) - statistic(theirs.double(), 0)
        assert difference.abs().max() < tolerance, difference
    # One pixel has no smaller part.
    assert (augment.draw_box(9, 1, 0.08, torch.Generator()) == torch.tensor([0, 0, 1, 1])).all()
