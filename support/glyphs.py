"""glyphs, the data set that needs no download: characters in the fonts that come with matplotlib.

Characters that look alike at this size, like C and c or 0 and O, share a class, so that a person
can tell all 47 classes apart.
"""
import math
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from support.files import atomic_write

CLASSES = ("0Oo 1 2 3 4 5 6 7 8 9 Cc Jj Kk Mm Pp Ss Uu Vv Ww Xx Yy Zz Il L i "
           "A a B b D d E e F f G g H h N n Q q R r T t").split()
FONTS = [f"DejaVu{family}{style}.ttf"
         for family, slant in (("Sans", "Oblique"), ("SansMono", "Oblique"), ("Serif", "Italic"))
         for style in ("", "-Bold", f"-{slant}", f"-Bold{slant}")]
FONTS += ["STIXGeneral.ttf", "STIXGeneralBol.ttf", "STIXGeneralItalic.ttf", "STIXGeneralBolIta.ttf"]
FONTS += ["cmr10.ttf", "cmb10.ttf", "cmss10.ttf", "cmtt10.ttf"]
# VERSION has to change with whatever changes the images. SIDE in pixels, images in each part.
VERSION, SIDE, N_TRAIN, N_TEST = "v5", 16, 16_000, 5000
# The difficulty, tuned so that the default teacher errs often enough to matter (README). Degrees;
# factors of size; offset of the character in half-sides; share of the full contrast.
ROTATION, ZOOM, JITTER, CONTRAST = 20, (1.05, 1.4), 0.3, (0.5, 1)
# Other characters in each image, their distance from the middle in half-sides, and noise's std.
DISTRACTORS, AWAY, NOISE = 3, (0.85, 1.3), (0.02, 0.17)


def load(root):
    """((train images, labels), (test images, labels), mean, std) from the cache in the folder
    `root`, which is rendered first if it is missing or damaged.

    images: (N, 3, SIDE, SIDE) uint8; labels: (N,) int64; mean, std: of the training images' red,
    green and blue in [0, 1].
    """
    path, names = root / f"glyphs-{VERSION}.npz", ("train_x", "train_y", "test_x", "test_y")
    try:
        with np.load(path) as cached:
            arrays = [torch.from_numpy(cached[name]) for name in names]
        for x, y in (arrays[:2], arrays[2:]):
            if ((x.shape, x.dtype) != ((len(y), 3, SIDE, SIDE), torch.uint8)
                    or (y.ndim, y.dtype) != (1, torch.int64) or y.max() >= len(CLASSES)):
                raise ValueError
    # A damaged file can raise nearly any exception.
    except Exception:
        print(f"rendering the glyphs data set into {path}", flush=True)
        arrays = [*render(N_TRAIN, seed=1), *render(N_TEST, seed=2)]
        root.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            np.savez(file, **dict(zip(names, map(torch.Tensor.numpy, arrays))))
    return tuple(arrays[:2]), tuple(arrays[2:]), *_statistics(arrays[0])


def mislabelled(labels, share=0.2):
    """Labels (N,) of which a share, always the same ones, says another class, drawn at random."""
    g = torch.Generator().manual_seed(3)
    wrong = torch.rand(len(labels), generator=g) < share
    other = torch.randint(1, len(CLASSES), labels.shape, generator=g)
    return torch.where(wrong, (labels + other) % len(CLASSES), labels)


def _statistics(images):
    """Mean and std of each channel in [0, 1], from exact counts of the 256 levels."""
    level = torch.arange(256, dtype=torch.float64) / 255
    count = [torch.bincount(images[:, c].flatten(), minlength=256) for c in range(3)]
    share = torch.stack(count).double()
    share /= share.sum(1, keepdim=True)
    mean = share @ level
    std = (share @ level.square() - mean.square()).clamp(min=1e-6).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


def _masks():
    """Every character in every font, centred: (fonts, characters, 48, 48) float in [0, 1]."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    masks = []
    for name in FONTS:
        font = ImageFont.truetype(str(folder / name), 34)
        for character in "".join(CLASSES):
            canvas = Image.new("L", (48, 48))
            left, top, right, bottom = font.getbbox(character)
            corner = 24 - (left + right) / 2, 24 - (top + bottom) / 2
            ImageDraw.Draw(canvas).text(corner, character, 255, font)
            masks.append(np.asarray(canvas))
    masks = torch.from_numpy(np.stack(masks)).float() / 255
    return masks.view(len(FONTS), -1, 48, 48)


def render(n, seed):
    """n images (n, 3, SIDE, SIDE) uint8 and their labels (n,) int64.

    Light characters at random font, colour, rotation, shear, scale and place, on a darker gradient
    with fragments of other characters and noise.
    """
    S, g = SIDE, torch.Generator().manual_seed(seed)
    masks = _masks()
    first = torch.tensor([sum(map(len, CLASSES[:k])) for k in range(len(CLASSES))])
    count = torch.tensor([len(name) for name in CLASSES])

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=g)

    def place(character, position):
        """Coverage (n, 1, S, S) of a character at `position`, x and y in half-sides from the
        middle."""
        font = torch.randint(len(FONTS), (n,), generator=g)
        turn, shear = uniform(-ROTATION, ROTATION, n) * math.pi / 180, uniform(-0.3, 0.3, n)
        zoom_x, zoom_y = uniform(*ZOOM, n), uniform(*ZOOM, n)
        x, y = position
        cos, sin = turn.cos(), turn.sin()
        inverse = torch.stack([torch.stack([cos, sin + shear * cos], 1) / zoom_x[:, None],
                               torch.stack([-sin, cos - shear * sin], 1) / zoom_y[:, None]], 1)
        shift = -(inverse @ torch.stack([x, y], 1)[..., None])
        # Drawn at twice the size and averaged, so that thin strokes do not break.
        size, matrix = (n, 1, 2 * S, 2 * S), torch.cat([inverse, shift], 2)
        grid = F.affine_grid(matrix, size, align_corners=False)
        cover = F.grid_sample(masks[font, character][:, None], grid, align_corners=False)
        return F.avg_pool2d(cover, 2)

    labels = torch.randint(len(CLASSES), (n,), generator=g)
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
