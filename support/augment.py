"""The operations of the weak and the strong view, on a batch at once.

Each takes uint8 images (B, 3, S, S). Those of RandAugment take one magnitude an image, (B,), and
give exactly what Pillow gives; tests/support/test_augment.py compares them pixel by pixel.
torchvision's own operations take one magnitude for a whole batch, and some round differently from
Pillow.
"""
import math

import torch
import torch.nn.functional as F
from torchvision.transforms import v2


def warp(images, matrix):
    """Pillow's Image.transform(AFFINE, NEAREST) with black fill, in 16.16 fixed point as there.

    matrix: (B, 6) float64. It maps the centre (x, y) of an output pixel into the input image:
    x' = a x + b y + c, y' = d x + e y + f.
    """
    B, _, H, W = images.shape
    a, b, c, d, e, f = matrix.to(torch.float64).unbind(1)
    fixed = torch.stack([a, b, c + (a + b) / 2, d, e, f + (d + e) / 2], 1)
    fixed = (fixed * 65536 + 0.5).floor().to(torch.int32).to(images.device)
    a, b, c, d, e, f = fixed[..., None, None].unbind(1)
    y, x = (torch.arange(n, dtype=torch.int32, device=images.device) for n in (H, W))
    x, y = x[None, None, :], y[None, :, None]
    # The column and the row that each output pixel comes from.
    u, v = (a * x + (b * y + c)) >> 16, (d * x + (e * y + f)) >> 16                      # (B, H, W)
    inside = (u >= 0) & (u < W) & (v >= 0) & (v < H)
    index = torch.where(inside, v * W + u, 0).long().view(B, 1, H * W).expand(-1, 3, -1)
    out = images.flatten(2).gather(2, index).view(B, 3, H, W)
    return out * inside[:, None]


def rotation(degrees, size):
    """The matrices (B, 6) that turn counter-clockwise about the image's centre, as Image.rotate.

    degrees: (B,). size: side of the images in pixels.
    """
    angle = -degrees.to(torch.float64) * (math.pi / 180)
    cos, sin, centre = angle.cos(), angle.sin(), size / 2
    return torch.stack([cos, sin, centre - cos * centre - sin * centre,
                        -sin, cos, centre + sin * centre - cos * centre], 1)


def _affine(a=1., b=0., c=0., d=0., e=1., f=0.):
    """The matrices (B, 6) for `warp` from numbers or (B,) tensors; the identity by default."""
    given = [torch.as_tensor(v, dtype=torch.float64) for v in (a, b, c, d, e, f)]
    return torch.stack(torch.broadcast_tensors(*given), 1)


def autocontrast(images, _):
    flat = images.flatten(2)
    low, high = (v[..., None].double() for v in (flat.amin(2), flat.amax(2)))            # (B, 3, 1)
    level = torch.arange(256, dtype=torch.float64, device=images.device)
    # Not 255 / x: torch computes that as 255 * (1 / x), which rounds twice, and Pillow once.
    scale = torch.full_like(low, 255) / (high - low).clamp(min=1)
    table = (level * scale - low * scale).trunc().clamp(0, 255)
    table = torch.where(high > low, table, level).byte()                               # (B, 3, 256)
    return table.gather(2, flat.long()).view_as(images)


def _per_image(numbers, images):
    """(B,) float or uint8 numbers as (B, 1, 1, 1), on the images' device."""
    return numbers.to(images.device)[:, None, None, None]


def _grey(images):
    """Pillow's convert("L"), (B, 1, S, S) int32."""
    r, g, b = images.int().unbind(1)
    return ((19595 * r + 38470 * g + 7471 * b + 32768) >> 16)[:, None]


def _blend(degenerate, images, factor):
    """Pillow's Image.blend for 0 <= factor <= 1: 0 gives `degenerate`, 1 the image itself."""
    degenerate, factor = degenerate.float(), _per_image(factor.float(), images)
    return (images - degenerate).mul_(factor).add_(degenerate).byte()


def brightness(images, factor):
    return _blend(torch.zeros_like(images), images, factor)


def color(images, factor):
    return _blend(_grey(images), images, factor)


def contrast(images, factor):
    mean = (_grey(images).double().mean((1, 2, 3), keepdim=True) + 0.5).floor()
    return _blend(mean, images, factor)


def sharpness(images, factor):
    # Pillow's SMOOTH: 3x3 of ones with a 5 in the middle, over 13; the border stays as it is.
    x = images.short()
    rows = x[:, :, :-2] + x[:, :, 1:-1] + x[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * x[:, :, 1:-1, 1:-1]
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = ((2 * total + 13) // 26).byte()
    return _blend(smooth, images, factor)


def posterize(images, bits):
    mask = 256 - 2 ** (8 - bits.floor())
    return images & _per_image(mask.byte(), images)


def solarize(images, threshold):
    return torch.where(images < _per_image(threshold.float(), images), images, 255 - images)


# FixMatch's RandAugment (Sohn et al., NeurIPS 2020): name -> (lowest magnitude, highest,
# operation). A geometric operation returns a matrix, so that one warp serves all of them.
# Translations are in fractions of the side, rotations in degrees.
COLOR_OPS = {
    "autocontrast": (0, 1, autocontrast),
    "brightness": (0.05, 0.95, brightness),
    "color": (0.05, 0.95, color),
    "contrast": (0.05, 0.95, contrast),
    "sharpness": (0.05, 0.95, sharpness),
    # The one operation for which torchvision's is bit-equal to Pillow's.
    "equalize": (0, 1, lambda images, _: v2.functional.equalize(images)),
    "identity": (0, 1, lambda images, _: images),
    "posterize": (4, 8, posterize),
    "solarize": (0, 256, solarize),
}
GEOMETRIC_OPS = {
    "rotate": (-30, 30, rotation),
    "shear_x": (-0.3, 0.3, lambda v, size: _affine(b=v)),
    "shear_y": (-0.3, 0.3, lambda v, size: _affine(d=v)),
    "translate_x": (-0.3, 0.3, lambda v, size: _affine(c=v * size)),
    "translate_y": (-0.3, 0.3, lambda v, size: _affine(f=v * size)),
}
OPS = {**COLOR_OPS, **GEOMETRIC_OPS}
# The colour of a cutout.
GREY = (125, 123, 114)


def randaugment(images, ops, magnitudes):
    """Apply to image i operation number ops[i] of OPS, at magnitudes[i] of the way from its lowest
    magnitude to its highest. ops: (B,) int64, magnitudes: (B,) in [0, 1], both on the CPU."""
    images, size = images.clone(), images.shape[-1]
    rows, matrices = [], []
    for number, (name, (low, high, op)) in enumerate(OPS.items()):
        hit = (ops == number).nonzero()[:, 0]
        if not len(hit):
            continue
        value = low + (high - low) * magnitudes[hit]
        if name in GEOMETRIC_OPS:
            rows.append(hit)
            matrices.append(op(value.double(), size))
        else:
            there = hit.to(images.device)
            images[there] = op(images[there], value)
    if rows:
        rows = torch.cat(rows).to(images.device)
        images[rows] = warp(images[rows], torch.cat(matrices))
    return images


def cutout(images, side, centre):
    """Draw a grey square on each image, clipped at the border.

    side: (B,), centre: (B, 2) of (x, y), in pixels, on the CPU. The corners are rounded as by
    FixMatch and ImageDraw.rectangle, which includes both ends.
    """
    S = images.shape[-1]
    start = (centre - side[:, None] / 2).clamp(min=0).floor()                     # (B, 2) of (x, y)
    stop = (start + side[:, None]).clamp(max=S).floor()
    start, stop, side = (v.to(images.device) for v in (start, stop, side))
    at = torch.arange(S, device=images.device)
    x, y = ((at >= start[:, i, None]) & (at <= stop[:, i, None]) for i in (0, 1))        # (B, S)
    mask = x[:, None, :] & y[:, :, None] & (side > 0)[:, None, None]
    grey = torch.tensor(GREY, dtype=torch.uint8, device=images.device).view(1, 3, 1, 1)
    return torch.where(mask[:, None], grey, images)


def crop_and_flip(images, offset, mirror):
    """A crop, of the images' own size, of each image padded with zeros; mirrored where `mirror`.

    offset: (B, 2) of (x, y), in pixels from the unpadded corner. mirror: (B,) bool.
    """
    sign = 1. - 2. * mirror
    x = torch.where(mirror, images.shape[-1] + offset[:, 0], offset[:, 0])
    return warp(images, _affine(a=sign, c=x, f=offset[:, 1]))


def resized_crop(images, box, mirror, size):
    """A box of each image, resized to size x size; mirrored where `mirror`.

    box: (B, 4) of (x, y, width, height), in pixels. mirror: (B,) bool. Bilinear, like torchvision's
    resized_crop without antialiasing, which a shrink by a factor of 8/7 at most does not need.
    """
    side = images.shape[-1]
    start, extent = box.float().to(images.device).view(-1, 2, 2, 1).unbind(1)            # (B, 2, 1)
    step = (torch.arange(size, device=images.device) + 0.5) / size
    # Where each output column and row lies in the input, clamped to the box.
    x, y = (start + (extent * step - 0.5).clamp(min=0).minimum(extent - 1)).unbind(1)    # (B, size)
    x = torch.where(mirror.to(images.device)[:, None], x.flip(1), x)
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), 3)
    grid = (2 * grid + 1) / side - 1
    out = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return out.round_().byte()


def draw_box(n, side, area, generator):
    """Random boxes (n, 4) of (x, y, width, height) in pixels, for images of side x side.

    As torchvision's RandomResizedCrop draws them: a share from `area` to 1 of the image, at ratios
    from 3:4 to 4:3; the first of ten tries that fits, or else the whole image.
    """
    share = area + (1 - area) * torch.rand(n, 10, generator=generator)
    ratio = ((2 * torch.rand(n, 10, generator=generator) - 1) * math.log(4 / 3)).exp()
    tries = (side * torch.stack([(share * ratio).sqrt(), (share / ratio).sqrt()], 2)).round()
    fits = ((tries > 0) & (tries <= side)).all(2)                                        # (n, 10)
    extent = tries[torch.arange(n), fits.byte().argmax(1)]                               # (n, 2)
    extent[~fits.any(1)] = side
    start = (torch.rand(n, 2, generator=generator) * (side - extent + 1)).floor()
    return torch.cat([start, extent], 1)
