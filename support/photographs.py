"""Folders of photographs, <part>/<class>/… or <class>/…, each part as one uint8 array on disk.

The array is decoded once and from then on mapped into memory, so a data set may be larger than the
memory. It is found again by the names, sizes and times of the image files. A digest of names and
pixels, kept at its end, tells two sets of images apart, also on another machine.
"""
import collections
import contextlib
import errno
import functools
import hashlib
import math
import os
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from support.console import progress
from support.errors import UserError
from support.files import atomic_write, cache_lock

# Where the arrays are kept. VERSION has to change with whatever changes their content.
CACHE, VERSION = Path("data"), "v3"
# What people call the folders of parts; those for --evaluate val come last.
VAL = "val", "valid", "validation"
PARTS = "train", "training", "test", "testing", *VAL
# What systems leave in folders beside names that begin with a dot.
LITTER = "__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini"
# What to do about photographs that Pillow does not read, or not everywhere.
READERS = {ending: way for way, endings in {
    "pip install pillow-heif": ".heic .heif .hif", "pip install -U pillow": ".avif .webp",
    "save as JPEG": ".arw .cr2 .cr3 .dng .jxl .nef .orf .pef .raf .rw2 .srw"}.items()
    for ending in endings.split()}


def stored_side(size):
    """The side, in pixels, at which photographs are stored that networks see at `size`: 256 for
    224. Crops are taken from the larger image."""
    return round(size * 8 / 7)


def centre(images, size):
    """The test view of photographs: (N, 3, side, side) -> (N, 3, size, size), which shares their
    memory."""
    at = (images.shape[-1] - size) // 2
    return images[:, :, at:at + size, at:at + size]


def one_ahead(function, arguments):
    """function(argument) for each of the arguments, in order. While one result is used, a thread
    makes the next. What the function raises is raised here; the thread ends with this generator."""
    coming = []
    with ThreadPoolExecutor(1) as thread:
        for argument in arguments:
            coming.append(thread.submit(function, argument))
            if len(coming) == 2:
                yield coming.pop(0).result()
        for last in coming:
            yield last.result()


def has_parts(root):
    """Whether the folder `root` holds parts, and not the classes themselves."""
    # Trains among vehicles are a class: a folder of that name without folders in it.
    named = [name for name in class_names(root) if name.lower() in PARTS]
    return len(named) > 1 or any(class_names(root / name) for name in named)


def looks_like_one(root):
    """Whether `root` is a folder of parts, or of classes with images."""
    return root.is_dir() and (has_parts(root) or any(
        _holds_images(root / name) for name in class_names(root)))


def _holds_images(folder):
    """Whether images lie in the folder itself."""
    return any(is_data(name) and _is_image(name) for name in os.listdir(folder))


def part(root, *names):
    """The first of these folders in `root`, in small letters or capitals, or None."""
    there = {name.lower(): root / name for name in reversed(class_names(root))}
    return next((there[name] for name in names if name in there), None)


def _is_part(root):
    """Whether `root` is one of the parts that lie beside each other."""
    above = root.resolve()
    return above.name.lower() in PARTS and has_parts(above.parent)


def has_val(root):
    """Whether `root` holds a folder for --evaluate val beside its test/."""
    return bool(part(root, "test") and part(root, *VAL))


def load(name, root, size, n_classes, cropped, train, measured="test"):
    """The image folder `root`: (train, test, classes, digests).

    name: the data set, for messages. size: side in pixels of the test images. n_classes: how many
    there have to be; None for any number from 2. cropped: whether training images are stored in a
    random order at stored_side(size), to be cropped later, or in order at `size`. train=False reads
    the training part's classes only. measured: "test", or "val" where `has_val`. A "folder" that
    holds the classes themselves is split.
    train, test: ((N, 3, S, S) uint8, (N,) int64), train None where it was not asked for. classes:
    the names of the training part's folders. digests: of the training images, where they were
    asked for, and of the test images.
    Raises UserError for a folder that is not laid out as expected or cannot be read, for a damaged
    image, and for a full disk.
    """
    expected = "train/<class>/ and val/<class>/ or test/<class>/"
    if name == "folder":
        expected += ", or <class>/ alone"
    if root.is_file():
        raise UserError(f"--data-dir {root}: a file, not a folder; an archive has to be unpacked")
    if not root.is_dir():
        raise UserError(f"--data-dir {root}: no such folder; it should hold {expected}")
    whole = name == "folder" and not has_parts(root)
    # ImageNet's published test part has no labels, so its val/ is measured.
    names = (*VAL, "test") if name == "imagenet" or measured == "val" else ("test", *VAL)
    test_folder, train_folder = (root, root) if whole else (part(root, *names), part(root, "train"))
    if not test_folder or train and not train_folder:
        alone = f"; or give --data-dir {train_folder}, which is then split"
        raise UserError(f"--data-dir {root}: should hold {expected}"
                        + alone * (name == "folder" and train_folder is not None))
    train_folder = train_folder or test_folder
    classes = class_names(train_folder)
    if n_classes not in (None, len(classes)):
        raise UserError(f"--data-dir {root}: {len(classes)} classes in {train_folder.name}/, where "
                        f"{name} has {n_classes}")
    if len(classes) < 2:
        images = f"; it holds images, so give the folder above it: --data-dir {train_folder.parent}"
        raise UserError(f"{train_folder}: has the classes {classes}; a classifier needs at least 2"
                        + f"; --data-dir should hold {expected}" * whole
                        + images * _holds_images(train_folder))
    if whole and any(has_parts(root / name) for name in classes):
        raise UserError(f"--data-dir {root}: its folders hold parts, not images of a class; give "
                        "one of them")
    left_out = []
    test_paths, test_labels = image_files(test_folder, classes, left_out)
    if whole:
        n = len(test_paths)
        (paths, labels), (test_paths, test_labels) = split(root, classes, test_paths, test_labels)
        beside = f"; for all of {root.resolve().parent} give that" if _is_part(root) else ""
        print(f"note      {root} has no train/ and test/: the test part is about a fifth of each "
              f"class, chosen by the files' names, {len(test_paths)} of {n} images{beside}")
    elif train:
        paths, labels = image_files(train_folder, classes, left_out)
    absent = [classes[k] for k in sorted({*range(len(classes))} - {*test_labels.tolist()})]
    if absent and not whole:
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        print(f"note      {test_folder} has no image of {', '.join(absent[:3])}{more}")
    if left_out:
        print("note      left out, since Pillow does not read them here: " + described(left_out))

    side, train_part, digests = stored_side(size) if cropped else size, None, ()
    if train:
        if cropped:
            # data.hold_out takes the first tenth of them without a copy, so that has to be random.
            order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0))
            paths, labels = [paths[i] for i in order], labels[order]
        images, *digests = decoded(train_folder, paths, side)
        train_part = images, labels
    images, digest = decoded(test_folder, test_paths, side)
    return train_part, (centre(images, size), test_labels), classes, (*digests, digest)


# --- Which files there are ------------------------------------------------------------------------

def is_data(name):
    """Whether a file or folder of this name can be an image or a class: .ipynb_checkpoints, ._1.jpg
    and the like, which systems leave behind, cannot."""
    return not name.startswith(".") and name not in LITTER


def class_names(folder):
    """The names of the folders in `folder`, in order."""
    try:
        return sorted(at.name for at in os.scandir(folder) if at.is_dir() and is_data(at.name))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror or error})")


def image_files(folder, classes, left_out):
    """(paths, labels): the images below folder/<class>/, in order, and (N,) int64.

    classes: all that there may be, in the order of the labels. left_out: a list, to which the files
    are added that Pillow does not read by their endings. Raises UserError for a class that is not
    one of them, for one without an image, and for what cannot be read.
    """
    names = class_names(folder)
    if not names:
        raise UserError(f"{folder}: holds no folder of a class")
    extra = sorted(set(names) - set(classes))
    if extra:
        raise UserError(f"{folder}: class {extra[0]!r} has no folder in the training part")
    paths, labels = [], []
    for name in names:
        files = list(_files_below(os.path.join(folder, name)))
        found = [path for path in files if _is_image(path)]
        others = sorted({*files} - {*found})
        if not found:
            raise UserError(f"{folder}: class {name!r} has no image; every class needs at least "
                            "one, in a format that Pillow reads"
                            + (f"; there are {described(others)}" if others else ""))
        for path in found:
            # Opening a pipe would wait forever.
            if not os.path.isfile(path):
                raise UserError(f"{path}: not a readable image (no file); mend or remove it")
        paths += found
        left_out += others
        labels += [classes.index(name)] * len(found)
    return paths, torch.tensor(labels)


@functools.cache
def _endings():
    """The endings, in lower case, of the files that Pillow reads here."""
    with contextlib.suppress(ImportError):
        import pillow_heif
        pillow_heif.register_heif_opener()
    Image.init()
    return tuple(end for end, form in Image.registered_extensions().items() if form in Image.OPEN)


def _is_image(name):
    return name.lower().endswith(_endings())


def described(left_out):
    """How many files of which endings these are, the first one's path, and what would read them."""
    counts = collections.Counter(os.path.splitext(path)[1].lower() for path in left_out)
    each = (f"{n} {end or 'without an ending'}" for end, n in counts.most_common(5))
    ways = dict.fromkeys(READERS[end] for end in counts if end in READERS)
    return "; ".join([f"{', '.join(each)}, the first {left_out[0]!r}", *ways])


def split(root, classes, paths, labels):
    """((paths, labels) to train on, the same to test on) of a folder `root` without parts.

    A digest of its name, <class>/…, decides for each image alone, so that it stays in its part when
    others are added, but for classes so small that a part would be empty. Raises UserError for a
    class of one image.
    """
    # From 0 to 1.
    draws = [int.from_bytes(hashlib.sha256(_name(root, path)).digest()[:8], "big") / 2 ** 64
             for path in paths]
    test = []
    for k, name in enumerate(classes):
        rows = sorted((labels == k).nonzero().flatten().tolist(), key=draws.__getitem__)
        if len(rows) < 2:
            raise UserError(f"{root}: class {name!r} has one image; it needs at least 2, one for "
                            "the training and one for the test part")
        test += rows[:min(max(1, sum(draws[row] < 0.2 for row in rows)), len(rows) - 1)]
    parts = sorted({*range(len(paths))} - {*test}), sorted(test)
    return [([paths[i] for i in rows], labels[rows]) for rows in parts]


# Not torchvision's make_dataset: it follows a link to a folder above round and round, and passes
# over a folder that it may not read without a word.
def _files_below(top):
    """The paths of the files below a class's folder, in order, those that are linked too."""
    root = os.path.realpath(top)
    seen = {root}
    try:
        for folder, inner, files in os.walk(top, onerror=_raise, followlinks=True):
            real = {name: os.path.realpath(os.path.join(folder, name))
                    for name in sorted(filter(is_data, inner))}
            here = root, os.path.realpath(folder)
            # A link to a folder around this one, or to one already seen, would repeat its images.
            inner[:] = [name for name, path in real.items()
                        if path not in seen and not any(p.startswith(path + os.sep) for p in here)]
            seen.update(real[name] for name in inner)
            yield from (os.path.join(folder, name) for name in sorted(filter(is_data, files)))
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})")


def _raise(error):
    raise error


# --- What is in them ------------------------------------------------------------------------------

def read_image(path, side):
    """(3, side, side) uint8, a NumPy array, of an image file: its first frame, turned upright,
    reduced to 8 bits, and of that the middle square. Raises UserError for a damaged file."""
    try:
        _endings()
        with Image.open(path) as image:
            # A JPEG far larger than needed is decoded at a half, a quarter or an eighth.
            image.draft(None, (2 * side, 2 * side))
            range_is_known = image.format in ("PNG", "PPM")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith(("I", "F")):
                # More than 8 bits. Only PNG and PPM say what the brightest value is.
                if not range_is_known:
                    raise ValueError(f"its range of brightness is not known, mode {image.mode}; "
                                     "save it with 8 bits")
                image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
            if image.has_transparency_data:
                # convert("RGB") would show the colour that is hidden under a transparent pixel.
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            w, h = image.size
            x, y = (w - min(w, h)) / 2, (h - min(w, h)) / 2
            image = image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR,
                                                box=(x, y, w - x, h - y))
            return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
    # Pillow's plug-ins raise nearly any exception on a damaged file.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        way = READERS.get(os.path.splitext(path)[1].lower())
        raise UserError(f"{path}: not a readable image ({reason}); mend or remove it"
                        + (f", or {way}" if way else ""))


def decoded(folder, paths, side):
    """The image files `paths` of `folder`: ((N, 3, side, side) uint8, read-only and mapped from a
    file in CACHE, digest of their names and pixels). Decodes them into that file if it is missing.

    Raises UserError for images that cannot be read, and for a full disk.
    """
    key = _key(folder, paths, side)
    path = CACHE / f"{folder.resolve().parent.name}-{folder.name}-{side}px-{key}.npy"
    shape = len(paths), 3, side, side
    need = f"{math.prod(shape)} bytes ({math.prod(shape) / 2 ** 30:.1f} GiB)"
    try:
        found = _read_array(path, shape)
        if not found:
            with cache_lock(CACHE):
                # Another process may have decoded them while this one waited.
                found = _read_array(path, shape)
                if not found:
                    free = shutil.disk_usage(CACHE).free
                    if free < math.prod(shape):
                        raise OSError(errno.ENOSPC, f"only {free} bytes are free")
                    _decode(folder, paths, shape, path)
                    found = _read_array(path, shape)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; the decoded images need {need} there; "
                        "make room, or give a smaller --image-size")
    return found


def _key(folder, paths, side):
    """A hash of the files' names below `folder`, sizes and times: another hash means that they may
    have changed."""
    hashed = hashlib.sha256(f"{VERSION} {side}".encode())
    for path in paths:
        try:
            about = os.stat(path)
        except OSError as error:
            raise UserError(f"{path}: not a readable image ({error.strerror}); mend or remove it")
        hashed.update(b"%b\0%d %d\0" % (_name(folder, path), about.st_size, about.st_mtime_ns))
    return hashed.hexdigest()[:12]


def _name(folder, path):
    return os.fsencode(path.removeprefix(str(folder)).replace(os.sep, "/"))


def _read_array(path, shape):
    """What `decoded` returns, from the file `path`; None if that is missing or damaged."""
    size = hashlib.sha256().digest_size
    try:
        array = np.load(path, mmap_mode="r")
        with open(path, "rb") as file:
            file.seek(array.offset + array.nbytes)
            digest = file.read(size + 1)
    except (FileNotFoundError, ValueError, EOFError):
        return None
    if array.shape != shape or len(digest) != size:
        return None
    # Mapped read-only, since a private writable map would count against the memory. torch warns.
    with warnings.catch_warnings(action="ignore"):
        return torch.from_numpy(array), digest.hex()[:12]


def _decode(folder, paths, shape, path):
    """Write the images into the file `path`, followed by the digest of their names and pixels."""
    for left_by_a_kill in CACHE.glob("*px-*.npy.*.tmp"):
        left_by_a_kill.unlink()
    print(f"decoding {len(paths)} images into {path} ({math.prod(shape) / 1e6:,.1f} MB)",
          flush=True)
    # The file is written, not mapped: writing to a map would end the process on a full disk.
    # Threads suffice, since Pillow decodes without the GIL. Taking 512 images at a time bounds how
    # many decoded ones wait in memory.
    with (atomic_write(path) as file, ThreadPoolExecutor() as pool,
          warnings.catch_warnings(action="ignore")):
        header = dict(descr="|u1", fortran_order=False, shape=shape)
        np.lib.format.write_array_header_1_0(file, header)
        hashed = hashlib.sha256()
        images = (image for at in range(0, len(paths), 512)
                  for image in pool.map(lambda path: _image_or_error(path, shape[-1]),
                                        paths[at:at + 512]))
        unread = {}
        for image, name in zip(progress(images, len(paths), "image"), paths):
            if isinstance(image, UserError):
                unread[name] = image
                continue
            file.write(image)
            hashed.update(_name(folder, name) + b"\0")
            hashed.update(image)
        if unread:
            # All at once, so that nobody has to start again for each of them.
            (_, first), *others = unread.items()
            more = ", ".join(name for name, _ in others[:10]) + ", …" * (len(others) > 10)
            raise UserError(str(first) + (f"; likewise {len(others)} more: {more}" if more else ""))
        file.write(hashed.digest())


def _image_or_error(path, side):
    try:
        return read_image(path, side)
    except UserError as error:
        return error
