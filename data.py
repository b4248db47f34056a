"""The images as uint8, in memory or, where they are photographs, mapped from one file on disk; and
the weak and strong views of them.

images: (N, 3, S, S) uint8 RGB; labels: (N,) int64. Every random draw of an epoch comes from one
CPU generator that is a function of (seed, epoch), so the views are the same on every device,
nothing needs a worker process, and a resumed run needs no random state.
"""
import dataclasses
import math
import urllib.error
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchvision import datasets
from torchvision.transforms import v2

import folders
from folders import UserError


@dataclasses.dataclass
class Dataset:
    """Two parts of (images, labels), and what the views need to know of them.

    train: None where only the test part was asked for. test: the part that is measured, at the size
    that networks see; held out of the training images where evaluate="val". classes: the C class
    names. mean, std: of RGB in [0, 1]. flip: whether a mirror image keeps its class. area: the
    least share of a photograph that its random crop keeps; None for images that are padded and
    cropped. digests: of the training and of the test images; the version of glyphs.
    """
    train: tuple
    test: tuple
    classes: list
    mean: tuple
    std: tuple
    flip: bool
    area: float = None
    digests: tuple = None


# --- Views ----------------------------------------------------------------------------------------
# Each operation takes uint8 images (B, 3, S, S) and one magnitude an image, (B,), and gives exactly
# what Pillow gives (tests/test_data.py compares them pixel by pixel). torchvision's own operations
# take one magnitude for a whole batch, and some round differently from Pillow.

def warp(images, matrix):
    """Pillow's Image.transform(AFFINE, NEAREST), black fill, in 16.16 fixed point as there.

    matrix (B, 6), float64, takes the centre of an output pixel to the input: x' = a x + b y + c,
    y' = d x + e y + f.
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
    """(B, 6): turns counter-clockwise about the image's centre, as Image.rotate does."""
    angle = -degrees.to(torch.float64) * (math.pi / 180)
    cos, sin, centre = angle.cos(), angle.sin(), size / 2
    return torch.stack([cos, sin, centre - cos * centre - sin * centre,
                        -sin, cos, centre + sin * centre - cos * centre], 1)


def _affine(a=1., b=0., c=0., d=0., e=1., f=0.):
    given = [torch.as_tensor(v, dtype=torch.float64) for v in (a, b, c, d, e, f)]
    return torch.stack(torch.broadcast_tensors(*given), 1)


def _lookup(images, table):
    """table (B, 3, 256) uint8, applied channel by channel."""
    return table.gather(2, images.flatten(2).long()).view_as(images)


def autocontrast(images, _):
    flat = images.flatten(2)
    low, high = (v[..., None].double() for v in (flat.amin(2), flat.amax(2)))            # (B, 3, 1)
    level = torch.arange(256, dtype=torch.float64, device=images.device)
    # Not 255 / x: torch computes that as 255 * (1 / x), which rounds twice.
    scale = torch.full_like(low, 255) / (high - low).clamp(min=1)
    table = (level * scale - low * scale).trunc().clamp(0, 255)
    return _lookup(images, torch.where(high > low, table, level).byte())


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


# RandAugment of FixMatch: name -> (lowest magnitude, highest, operation). A geometric one gives a
# matrix, all of them are then warped at once; translations are in fractions of the side.
COLOR_OPS = {
    "autocontrast": (0, 1, autocontrast),
    "brightness": (0.05, 0.95, brightness),
    "color": (0.05, 0.95, color),
    "contrast": (0.05, 0.95, contrast),
    "sharpness": (0.05, 0.95, sharpness),
    # The one operation that torchvision has bit-equal to Pillow.
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
GREY = (125, 123, 114)


def randaugment(images, ops, magnitudes):
    """Apply operation number ops[i] of OPS, at its magnitude, to image i. Both (B,), on the CPU."""
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
        elif name != "identity":
            there = hit.to(images.device)
            images[there] = op(images[there], value)
    if rows:
        rows = torch.cat(rows).to(images.device)
        images[rows] = warp(images[rows], torch.cat(matrices))
    return images


def cutout(images, side, centre):
    """A grey square, clipped at the border. side (B,) and centre (B, 2): in pixels, on the CPU.

    Its corners are rounded as FixMatch and ImageDraw.rectangle do, both ends included.
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
    """The weak view: a crop of the image padded with zeros, then a mirror image.

    offset (B, 2) of (x, y): in pixels from the unpadded corner. mirror (B,): bool.
    """
    sign = 1. - 2. * mirror
    x = torch.where(mirror, images.shape[-1] + offset[:, 0], offset[:, 0])
    return warp(images, _affine(a=sign, c=x, f=offset[:, 1]))


def resized_crop(images, box, mirror, size):
    """The weak view of photographs: a box of each, resized to size x size, then a mirror image.

    box (B, 4) of (x, y, width, height): in pixels. mirror (B,): bool. Bilinear, as torchvision's
    resized_crop without antialias, which a shrinking by 8/7 at most does not need.
    """
    side = images.shape[-1]
    start, extent = box.float().to(images.device).view(-1, 2, 2, 1).unbind(1)            # (B, 2, 1)
    step = (torch.arange(size, device=images.device) + 0.5) / size
    # Where each output column and row lies in the input; never beyond the box.
    x, y = (start + (extent * step - 0.5).clamp(min=0).minimum(extent - 1)).unbind(1)    # (B, size)
    x = torch.where(mirror.to(images.device)[:, None], x.flip(1), x)
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), 3)
    grid = (2 * grid + 1) / side - 1
    out = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return out.round_().byte()


def draw_box(n, side, area, generator):
    """(n, 4) of (x, y, width, height): a share from `area` to 1 of each photograph, 3:4 to 4:3.

    As torchvision's RandomResizedCrop draws it: the first of ten tries that fits, or all of it.
    """
    share = area + (1 - area) * torch.rand(n, 10, generator=generator)
    ratio = ((2 * torch.rand(n, 10, generator=generator) - 1) * math.log(4 / 3)).exp()
    tries = (side * torch.stack([(share * ratio).sqrt(), (share / ratio).sqrt()], 2)).round()
    fits = ((tries > 0) & (tries <= side)).all(2)                                        # (n, 10)
    extent = tries[torch.arange(n), fits.byte().argmax(1)]                               # (n, 2)
    extent[~fits.any(1)] = side
    start = (torch.rand(n, 2, generator=generator) * (side - extent + 1)).floor()
    return torch.cat([start, extent], 1)


def draw(n, size, flip, generator, side=None, area=None):
    """The random numbers for one view of n images, as CPU tensors.

    side: that of photographs, as they are stored. area: as in Dataset.
    """
    # 4 pixels of 32.
    pad = size // 8
    place = (dict(offset=torch.randint(-pad, pad + 1, (n, 2), generator=generator))
             if area is None else dict(box=draw_box(n, side, area, generator)))
    return place | dict(
        mirror=(torch.rand(n, generator=generator) < 0.5) & flip,
        ops=torch.randint(len(OPS), (n, 2), generator=generator),
        magnitudes=torch.rand(n, 2, generator=generator),
        side=torch.rand(n, generator=generator) * 0.5 * size,
        centre=torch.rand(n, 2, generator=generator) * size,
    )


def weak_view(images, numbers, size=None):
    if "box" in numbers:
        return resized_crop(images, numbers["box"], numbers["mirror"], size)
    return crop_and_flip(images, numbers["offset"], numbers["mirror"])


def strong_view(images, numbers, size=None):
    images = weak_view(images, numbers, size)
    for i in (0, 1):
        images = randaugment(images, numbers["ops"][:, i], numbers["magnitudes"][:, i])
    return cutout(images, numbers["side"], numbers["centre"])


def normalize(images, mean, std):
    """uint8 to float32:  (x / 255 - mean) / std."""
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (mean, std))
    return (images / 255).sub_(mean).div_(std)


def batches(dataset, batch_size, views, seed, epoch, rank=0, world=1, device=None):
    """One epoch of (list of views, labels), shuffled; the tail is kept. Of `world` processes,
    number `rank` takes its share of each batch; where a tail has no row for it, the tail's first.

    views: "weak", or "both" for weak and strong, with crop and flip drawn anew. A view: (B, 3, S,
    S) float32, normalised. device: where they are made; default: where the images are. Views of
    small images are made for many batches at once: small batches would spend their time starting
    operations. Those of large ones, on a CPU, are made few at a time, which stay in its cache.
    """
    images, labels = dataset.train
    n, size, device = len(images), dataset.test[0].shape[-1], device or images.device
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    order = torch.randperm(n, generator=generator)
    numbers = [draw(n, size, dataset.flip, generator, images.shape[-1], dataset.area)
               for _ in range(1 + (views == "both"))]
    if world > 1:
        mine, tail = torch.arange(n) % batch_size % world == rank, n % batch_size
        mine[n - tail:n - tail + 1] |= rank >= tail
        order, numbers = order[mine], [{k: v[mine] for k, v in view.items()} for view in numbers]
        n, batch_size = len(order), len(range(rank, batch_size, world))
    at_once = max(1, (512 if device.type == "cpu" else 8192) * 32 ** 2 // size ** 2)
    chunk = batch_size * max(1, at_once // batch_size)

    def make(at):
        """The views, normalised, of the images number `at` of this epoch, a slice."""
        rows = images.index_select(0, order[at].to(images.device)).to(device)
        drawn = [{k: v[at] for k, v in view.items()} for view in numbers]
        return [normalize(view(rows, values, size), dataset.mean, dataset.std)
                for view, values in zip((weak_view, strong_view), drawn)]

    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        made = [torch.empty(stop - start, 3, size, size, device=device) for _ in numbers]
        for at in range(start, stop, at_once):
            for whole, piece in zip(made, make(slice(at, min(at + at_once, stop)))):
                whole[at - start:at - start + len(piece)] = piece
        target = labels[order[start:stop].to(labels.device)].to(device)
        for at in range(0, stop - start, batch_size):
            yield [view[at:at + batch_size] for view in made], target[at:at + batch_size]


# --- glyphs: the embedded default -----------------------------------------------------------------
# Characters drawn with the fonts that ship with matplotlib. Case pairs that look alike are one
# class, so that a person can tell all 47 apart.

GLYPHS = ("0Oo 1 2 3 4 5 6 7 8 9 Cc Jj Kk Mm Pp Ss Uu Vv Ww Xx Yy Zz Il L i "
          "A a B b D d E e F f G g H h N n Q q R r T t").split()
FONTS = [f"DejaVu{family}{style}.ttf"
         for family, slant in (("Sans", "Oblique"), ("SansMono", "Oblique"), ("Serif", "Italic"))
         for style in ("", "-Bold", f"-{slant}", f"-Bold{slant}")]
FONTS += ["STIXGeneral.ttf", "STIXGeneralBol.ttf", "STIXGeneralItalic.ttf", "STIXGeneralBolIta.ttf"]
FONTS += ["cmr10.ttf", "cmb10.ttf", "cmss10.ttf", "cmtt10.ttf"]
# The difficulty, tuned so that the default teacher errs often enough to matter (README).
GLYPHS_VERSION, GLYPHS_SIZE, GLYPHS_TRAIN, GLYPHS_TEST = "v5", 16, 16_000, 5000
ROTATION, ZOOM, JITTER, CONTRAST = 20, (1.05, 1.4), 0.3, (0.5, 1)
DISTRACTORS, AWAY, NOISE = 3, (0.85, 1.3), (0.02, 0.17)


def _masks():
    """Every character in every font, centred: (fonts, characters, 48, 48) float in [0, 1]."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    masks = []
    for name in FONTS:
        font = ImageFont.truetype(str(folder / name), 34)
        for character in "".join(GLYPHS):
            canvas = Image.new("L", (48, 48))
            left, top, right, bottom = font.getbbox(character)
            corner = 24 - (left + right) / 2, 24 - (top + bottom) / 2
            ImageDraw.Draw(canvas).text(corner, character, 255, font)
            masks.append(np.asarray(canvas))
    masks = torch.from_numpy(np.stack(masks)).float() / 255
    return masks.view(len(FONTS), -1, 48, 48)


def render_glyphs(n, seed):
    """n images (n, 3, S, S) uint8 and their labels (n,).

    Light characters at random font, colour, rotation, shear, scale and place, on a darker gradient
    with fragments of other characters and noise.
    """
    S, g = GLYPHS_SIZE, torch.Generator().manual_seed(seed)
    masks = _masks()
    first = torch.tensor([sum(map(len, GLYPHS[:k])) for k in range(len(GLYPHS))])
    count = torch.tensor([len(name) for name in GLYPHS])

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=g)

    def place(character, radius):
        """Coverage (n, 1, S, S) of a character, `radius` half-sides away from the middle."""
        font = torch.randint(len(FONTS), (n,), generator=g)
        turn, shear = uniform(-ROTATION, ROTATION, n) * math.pi / 180, uniform(-0.3, 0.3, n)
        zoom_x, zoom_y = uniform(*ZOOM, n), uniform(*ZOOM, n)
        x, y = radius
        cos, sin = turn.cos(), turn.sin()
        inverse = torch.stack([torch.stack([cos, sin + shear * cos], 1) / zoom_x[:, None],
                               torch.stack([-sin, cos - shear * sin], 1) / zoom_y[:, None]], 1)
        shift = -(inverse @ torch.stack([x, y], 1)[..., None])
        # Drawn at twice the size, so that thin strokes do not break.
        size, matrix = (n, 1, 2 * S, 2 * S), torch.cat([inverse, shift], 2)
        grid = F.affine_grid(matrix, size, align_corners=False)
        cover = F.grid_sample(masks[font, character][:, None], grid, align_corners=False)
        return F.avg_pool2d(cover, 2)

    labels = torch.randint(len(GLYPHS), (n,), generator=g)
    character = first[labels] + (torch.rand(n, generator=g) * count[labels]).long()
    angle, side = uniform(0, 2 * math.pi, n), torch.linspace(-1, 1, S)
    y, x = torch.meshgrid(side, side, indexing="ij")
    along = 0.5 + 0.35 * (angle.cos()[:, None, None] * x + angle.sin()[:, None, None] * y)[:, None]
    start, end = uniform(0, 0.45, n, 3, 1, 1), uniform(0, 0.45, n, 3, 1, 1)
    images = torch.lerp(start, end, along.clamp(0, 1))
    for _ in range(DISTRACTORS):
        other, angle = torch.randint(masks.shape[1], (n,), generator=g), uniform(0, 2 * math.pi, n)
        away = uniform(*AWAY, n)
        cover = place(other, (away * angle.cos(), away * angle.sin()))
        images = torch.lerp(images, uniform(0.3, 0.9, n, 3, 1, 1), cover)
    cover = place(character, (uniform(-JITTER, JITTER, n), uniform(-JITTER, JITTER, n)))
    images = torch.lerp(images, uniform(0.5, 1, n, 3, 1, 1), cover)
    images = images + uniform(*NOISE, n, 1, 1, 1) * torch.randn(images.shape, generator=g)
    images = torch.lerp(uniform(0, 0.4, n, 1, 1, 1), images, uniform(*CONTRAST, n, 1, 1, 1))
    return (images.clamp(0, 1) * 255).round().byte(), labels


# --- Loading --------------------------------------------------------------------------------------

# C, mean and std as published.
CIFAR = {
    "cifar10": (10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": (100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}
IMAGENET = (1000, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# The side in pixels; that of photographs can be chosen.
SIDES = {"glyphs": GLYPHS_SIZE, "cifar10": 32, "cifar100": 32, "folder": 64, "imagenet": 224}
DATASETS = tuple(SIDES)
# Sets of photographs, and Dataset.area of each.
AREAS = {"folder": 0.35, "imagenet": 0.08}


def load(name, data_dir="data", image_size=None, train=True, evaluate="test"):
    """The data set as a Dataset on the CPU.

    name: one of DATASETS. data_dir: the folder of images for "folder" and "imagenet", else where
    the set is cached, or stands as an image folder. image_size: side in pixels, for photographs
    (64 and 224). train=False leaves the training part out. evaluate="val" puts a tenth of the
    training images, which then is not trained on, in place of the test part.
    Raises UserError for whatever the user can mend.
    """
    if evaluate == "val":
        return hold_out(load(name, data_dir, image_size))
    root = Path(data_dir)
    if name not in AREAS and image_size not in (None, SIDES[name]):
        raise UserError(f"--image-size {image_size}: {name} has {SIDES[name]}-pixel images; leave "
                        "the flag out")
    if name == "glyphs":
        return _load_glyphs(root, train)
    if name in AREAS or (root / "train").is_dir() and (root / "test").is_dir():
        return _load_folder(name, root, image_size or SIDES[name], train)
    try:
        with warnings.catch_warnings(action="ignore"), folders.alone():
            parts = [getattr(datasets, name.upper())(root, train=part, download=True)
                     for part in (True, False)]
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise UserError(f"--dataset {name}: not under --data-dir {root}, and the download failed "
                        f"({error}); put it there as train/<class>/ and test/<class>/ image "
                        "folders, or try again online")
    train_part, test_part = ((torch.from_numpy(p.data).permute(0, 3, 1, 2).contiguous(),
                              torch.tensor(p.targets)) for p in parts)
    return Dataset(train_part if train else None, test_part, parts[0].classes, *CIFAR[name][1:],
                   flip=True)


def hold_out(dataset):
    """The Dataset that measures on a seeded tenth of its training images, at least one."""
    images, labels = dataset.train
    n = max(1, len(labels) // 10)
    if dataset.area is not None:
        # Too large to be copied, and stored in such an order already.
        val = centre(images[:n], dataset.test[0].shape[-1]), labels[:n]
        return dataclasses.replace(dataset, train=(images[n:], labels[n:]), test=val)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    val, train = order.split([n, len(order) - n])
    return dataclasses.replace(dataset, train=(images[train], labels[train]),
                               test=(images[val], labels[val]))


def _statistics(images):
    """Mean and std of each channel in [0, 1], from exact counts of the 256 levels."""
    level = torch.arange(256, dtype=torch.float64) / 255
    count = [torch.bincount(images[:, c].flatten(), minlength=256) for c in range(3)]
    share = torch.stack(count).double()
    share /= share.sum(1, keepdim=True)
    mean = share @ level
    std = (share @ level.square() - mean.square()).clamp(min=1e-6).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


def _load_glyphs(root, train):
    path, names = root / f"glyphs-{GLYPHS_VERSION}.npz", ("train_x", "train_y", "test_x", "test_y")
    try:
        with np.load(path) as cached:
            arrays = [torch.from_numpy(cached[name]) for name in names]
        for x, y in (arrays[:2], arrays[2:]):
            if ((x.shape, x.dtype) != ((len(y), 3, GLYPHS_SIZE, GLYPHS_SIZE), torch.uint8)
                    or (y.ndim, y.dtype) != (1, torch.int64) or y.max() >= len(GLYPHS)):
                raise ValueError
    # Not there yet, or damaged, which can raise nearly anything.
    except Exception:
        print(f"rendering the glyphs data set into {path}", flush=True)
        arrays = [*render_glyphs(GLYPHS_TRAIN, seed=1), *render_glyphs(GLYPHS_TEST, seed=2)]
        root.mkdir(parents=True, exist_ok=True)
        with folders.replacing(path) as file:
            np.savez(file, **dict(zip(names, map(torch.Tensor.numpy, arrays))))
    mean, std = _statistics(arrays[0])
    # A mirrored character is another character, or none.
    return Dataset(tuple(arrays[:2]) if train else None, tuple(arrays[2:]), GLYPHS, mean, std,
                   flip=False, digests=(GLYPHS_VERSION,))


def stored_side(size):
    """That of photographs which networks see at `size` pixels: 256 for 224."""
    return round(size * 8 / 7)


def centre(images, size):
    """The test view of photographs (N, 3, side, side): not a copy."""
    at = (images.shape[-1] - size) // 2
    return images[:, :, at:at + size, at:at + size]


def _load_folder(name, root, image_size, train):
    expected, mean, std = CIFAR.get(name, IMAGENET)
    if root.is_file():
        raise UserError(f"--data-dir {root}: a file, not a folder; an archive has to be unpacked")
    if not root.is_dir():
        raise UserError(f"--data-dir {root}: no such folder; it should hold train/<class>/ and "
                        "val/<class>/ or test/<class>/")
    # The published test part of ImageNet has no labels; its val/ is what is measured.
    names = ("val", "test") if name == "imagenet" else ("test", "val")
    test_folder = next((root / part for part in names if (root / part).is_dir()), None)
    train_folder = root / "train" if train or (root / "train").is_dir() else test_folder
    if test_folder is None or not train_folder.is_dir():
        raise UserError(f"--data-dir {root}: should hold train/<class>/ and val/<class>/ or "
                        "test/<class>/")
    classes = folders.class_names(train_folder)
    if name != "folder" and len(classes) != expected:
        raise UserError(f"--data-dir {root}: {len(classes)} classes in {train_folder.name}/, where "
                        f"{name} has {expected}")
    if len(classes) < 2:
        raise UserError(f"{train_folder}: has the classes {classes}; a classifier needs at least 2")
    test_paths, test_labels = folders.scan(test_folder, classes)

    side = stored_side(image_size) if name in AREAS else image_size
    train_part, digests = None, ()
    if train:
        paths, labels = folders.scan(train_folder, classes)
        if name in AREAS:
            # In a random order, of which hold_out takes the head.
            order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0))
            paths, labels = [paths[i] for i in order], labels[order]
        images, *digests = folders.decoded(train_folder, paths, side)
        train_part = images, labels
    test, digest = folders.decoded(test_folder, test_paths, side)
    return Dataset(train_part, (centre(test, image_size), test_labels), classes, mean, std,
                   flip=True, area=AREAS.get(name), digests=(*digests, digest))
