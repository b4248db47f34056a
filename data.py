"""The data sets, and the weak and the strong view of their images.

images: (N, 3, S, S) uint8 RGB, in memory or, where they are photographs, mapped from a file on
disk; labels: (N,) int64. Every random draw of an epoch comes from one CPU generator that is a
function of (seed, epoch). So the views are the same on every device, those of photographs to within
a level on rare pixels; nothing needs a worker process, and a resumed run needs no random state.
What each operation of the views does to the pixels is in support/augment.py.
"""
import dataclasses
import urllib.error
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torchvision import datasets

from support import glyphs, photographs
from support.augment import OPS, crop_and_flip, cutout, draw_box, randaugment, resized_crop
from support.errors import UserError
from support.files import cache_lock


class Facts(NamedTuple):
    """What is known of a data set before it is read.

    side: in pixels; of photographs it is the default, and can be chosen. classes: how many, or None
    for any number. mean, std, flip, area: as in Dataset; mean and std None: those of the images.
    """
    side: int
    classes: int
    mean: tuple
    std: tuple
    flip: bool
    area: float = None


# Mean and std as they are published with each set; a folder's are ImageNet's.
_OF_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DATASETS = {  # side, classes, mean, std, flip, area
    # A mirrored character is another character, or none.
    "glyphs": Facts(glyphs.SIDE, len(glyphs.CLASSES), None, None, False),
    # A fifth of the training labels are wrong, to see what a swap does then.
    "glyphs-noisy": Facts(glyphs.SIDE, len(glyphs.CLASSES), None, None, False),
    "cifar10": Facts(32, 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), True),
    "cifar100": Facts(32, 100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), True),
    "folder": Facts(64, None, *_OF_IMAGENET, True, 0.35),
    "imagenet": Facts(224, 1000, *_OF_IMAGENET, True, 0.08),
}
# Those that are cropped and resized, not padded and cropped.
PHOTOGRAPHS = tuple(name for name, facts in DATASETS.items() if facts.area)


@dataclasses.dataclass
class Dataset:
    """Two parts of (images, labels), and what the views need to know of them.

    train: None where only the test part was asked for. test: the part that is measured, at the size
    that networks see. classes: the C class names. mean, std: of red, green and blue in [0, 1].
    flip: whether a mirror image keeps its class. area: the least share of a photograph that its
    random crop keeps; None for images that are padded and cropped. digests: what tells these images
    from others: of photographs a digest of the training and of the measured images, of glyphs their
    version. held_out: whether those that are measured were taken out of the training images.
    """
    train: tuple
    test: tuple
    classes: list
    mean: tuple
    std: tuple
    flip: bool
    area: float = None
    digests: tuple = None
    held_out: bool = False


# --- Views ----------------------------------------------------------------------------------------

def draw(n, size, flip, generator, side=None, area=None):
    """The random numbers for one view of n images: {name: (n, …) CPU tensor}.

    size: side in pixels of the view. flip, area: as in Dataset. side: that of photographs, as they
    are stored.
    """
    # CIFAR's customary 4 pixels of 32.
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
    """A random crop, mirrored or not: (B, 3, S, S) uint8 -> the same, (B, 3, size, size) for
    photographs. numbers: of `draw`, a row an image."""
    if "box" in numbers:
        return resized_crop(images, numbers["box"], numbers["mirror"], size)
    return crop_and_flip(images, numbers["offset"], numbers["mirror"])


def strong_view(images, numbers, size=None):
    """A weak view, then two random operations of RandAugment and a grey square, as in FixMatch
    (Sohn et al., NeurIPS 2020). Shapes as for `weak_view`."""
    images = weak_view(images, numbers, size)
    for i in (0, 1):
        images = randaugment(images, numbers["ops"][:, i], numbers["magnitudes"][:, i])
    return cutout(images, numbers["side"], numbers["centre"])


def normalize(images, mean, std):
    """uint8 to float32:  (x / 255 - mean) / std."""
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (mean, std))
    return (images / 255).sub_(mean).div_(std)


def batches(dataset, batch_size, views, seed, epoch, rank=0, world=1, device=None):
    """One epoch, shuffled, as pairs of (list of views, labels); the last batch may be smaller.

    views: "weak", or "both" for weak and strong, whose crops are drawn independently. A view is
    (B, 3, S, S) float32, normalised. device: where the views are made; default: where the images
    are. Of `world` processes, this one is number `rank` and gets its share of each batch. If the
    last batch has fewer rows than processes, a spare process repeats its first row (which
    train.py weights by 0).
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
    # Views of small images are made for many batches at once, since small batches would spend their
    # time starting operations. Large images on a CPU are taken few at a time, to stay in its cache.
    at_once = max(1, (512 if device.type == "cpu" else 8192) * 32 ** 2 // size ** 2)
    chunk = batch_size * max(1, at_once // batch_size)

    def fetch(at):
        """The images at the positions `at`, a slice, of this epoch."""
        return images.index_select(0, order[at].to(images.device))

    def make(at, rows):
        """The normalised views of these images."""
        rows, drawn = rows.to(device), [{k: v[at] for k, v in view.items()} for view in numbers]
        return [normalize(view(rows, values, size), dataset.mean, dataset.std)
                for view, values in zip((weak_view, strong_view), drawn)]

    pieces = [slice(at, min(at + at_once, start + chunk, n)) for start in range(0, n, chunk)
              for at in range(start, min(start + chunk, n), at_once)]
    # Photographs may have to be read from a disk.
    fetched = (map if dataset.area is None else photographs.one_ahead)(fetch, pieces)
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        made = [torch.empty(stop - start, 3, size, size, device=device) for _ in numbers]
        for at in range(start, stop, at_once):
            for whole, piece in zip(made, make(slice(at, min(at + at_once, stop)), next(fetched))):
                whole[at - start:at - start + len(piece)] = piece
        target = labels[order[start:stop].to(labels.device)].to(device)
        for at in range(0, stop - start, batch_size):
            yield [view[at:at + batch_size] for view in made], target[at:at + batch_size]


# --- Loading --------------------------------------------------------------------------------------

def load(name, data_dir="data", image_size=None, train=True, evaluate="test"):
    """The data set as a Dataset on the CPU.

    name: a key of DATASETS. data_dir: the folder of images for "folder" and "imagenet"; for the
    others, where the set is cached, or stands as an image folder. image_size: side in pixels, for
    photographs only; default: the table's. train=False leaves the training part out.
    evaluate="val" measures on the folder val/ where that lies beside test/ (but not of ImageNet,
    whose val/ is its test part), or else on a tenth of the training images, which are then not
    trained on. Raises UserError for whatever the user can mend.
    """
    root, facts = Path(data_dir), DATASETS[name]
    rendered = name.startswith("glyphs")
    in_folders = name in PHOTOGRAPHS or not rendered and all(
        (root / part).is_dir() for part in ("train", "test"))
    if evaluate == "val" and not (in_folders and name != "imagenet" and photographs.has_val(root)):
        return hold_out(load(name, data_dir, image_size))
    if name not in PHOTOGRAPHS and image_size not in (None, facts.side):
        raise UserError(f"--image-size {image_size}: {name} has {facts.side}-pixel images; leave "
                        "the flag out")
    mean, std, digests = facts.mean, facts.std, None
    if rendered:
        (images, labels), test_part, mean, std = glyphs.load(root)
        train_part = images, labels if name == "glyphs" else glyphs.mislabelled(labels)
        classes, digests = glyphs.CLASSES, (glyphs.VERSION,)
    elif in_folders:
        train_part, test_part, classes, digests = photographs.load(
            name, root, image_size or facts.side, facts.classes, name in PHOTOGRAPHS, train,
            evaluate)
    else:
        train_part, test_part, classes = _download(name, root)
    return Dataset(train_part if train else None, test_part, classes, mean, std, facts.flip,
                   facts.area, digests)


def _download(name, root):
    """(train, test, classes) of a CIFAR set, from the folder `root`, or else from its publisher."""
    try:
        with warnings.catch_warnings(action="ignore"), cache_lock(photographs.CACHE):
            parts = [getattr(datasets, name.upper())(root, train=part, download=True)
                     for part in (True, False)]
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise UserError(f"--dataset {name}: not under --data-dir {root}, and the download failed "
                        f"({error}); put it there as train/<class>/ and test/<class>/ image "
                        "folders, or try again online")
    train_part, test_part = ((torch.from_numpy(p.data).permute(0, 3, 1, 2).contiguous(),
                              torch.tensor(p.targets)) for p in parts)
    return train_part, test_part, parts[0].classes


def hold_out(dataset):
    """The Dataset that measures on a seeded tenth of its training images, at least one, and trains
    on the others."""
    images, labels = dataset.train
    n = max(1, len(labels) // 10)
    if dataset.area is not None:
        # Photographs are too many to copy, and support/photographs.py stores them shuffled.
        val = photographs.centre(images[:n], dataset.test[0].shape[-1]), labels[:n]
        return dataclasses.replace(dataset, train=(images[n:], labels[n:]), test=val, held_out=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    val, train = order.split([n, len(order) - n])
    return dataclasses.replace(dataset, train=(images[train], labels[train]),
                               test=(images[val], labels[val]), held_out=True)
