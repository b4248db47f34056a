"""An image folder as one uint8 array on disk, decoded once and then mapped into memory.

The array is found again by the files' names, sizes and times. What tells two sets apart, also on
another machine, is a digest of names and pixels, at its end.
"""
import contextlib
import errno
import hashlib
import math
import os
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

# Where the arrays are kept. The version changes with what is in them.
CACHE, VERSION = Path("data"), "v3"


class UserError(ValueError):
    """Something the user can mend: one line that names the flag or file and says what to do."""

    def __str__(self):
        # A file's name may hold a line break.
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in super().__str__())


@contextlib.contextmanager
def blaming(what):
    """A ValueError raised within becomes a UserError that begins with `what`, a flag or a file."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"{what}{error}")


@contextlib.contextmanager
def replacing(path):
    """A binary file to write into, which takes the place of `path` once it is whole and on disk:
    whenever the process ends, there is the old file or the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def locked(path, wait=False):
    """A context that one process at a time is in, however it ends. Raises filelock.Timeout where
    another one is in. A file system that knows no locks keeps nobody out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return filelock.FileLock(path).acquire(blocking=wait)
    except filelock.Timeout:
        raise
    except (OSError, NotImplementedError):
        return contextlib.nullcontext()


def class_names(folder):
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})")


def scan(folder, classes):
    """(paths, labels) of the images in folder/<class>/.

    classes: all that there may be, in the order of the labels.
    """
    names = class_names(folder)
    extra = sorted(set(names) - set(classes))
    if extra:
        raise UserError(f"{folder}: class {extra[0]!r} has no folder in the training part")
    Image.init()
    endings = tuple(end for end, form in Image.registered_extensions().items()
                    if form in Image.OPEN)
    paths, labels = [], []
    for name in names:
        found = list(_image_files(os.path.join(folder, name), endings))
        if not found:
            raise UserError(f"{folder}: class {name!r} has no image; every class needs at least "
                            "one, in a format that Pillow reads")
        paths += found
        labels += [classes.index(name)] * len(found)
    return paths, torch.tensor(labels)


def _image_files(top, endings):
    """The paths of the image files below a class's folder, in order, those that are linked too."""
    root = os.path.realpath(top)
    seen = {root}
    try:
        for folder, inner, files in os.walk(top, onerror=_raise, followlinks=True):
            real = {name: os.path.realpath(os.path.join(folder, name)) for name in sorted(inner)}
            here = root, os.path.realpath(folder)
            # A link to a folder around this one, or to one that was seen, would repeat its images.
            inner[:] = [name for name, path in real.items()
                        if path not in seen and not any(p.startswith(path + os.sep) for p in here)]
            seen.update(real[name] for name in inner)
            for name in sorted(files):
                path = os.path.join(folder, name)
                if not name.lower().endswith(endings):
                    continue
                # Reading a pipe would wait for ever.
                if not os.path.isfile(path):
                    raise UserError(f"{path}: not a readable image (no file); mend or remove it")
                yield path
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})")


def _raise(error):
    raise error


def read_image(path, side):
    """(3, side, side) uint8 of an image file: first frame, upright, 8 bits, its middle square."""
    try:
        with Image.open(path) as image:
            # A JPEG far larger than needed is decoded at a half, a quarter or an eighth.
            image.draft(None, (2 * side, 2 * side))
            known = image.format in ("PNG", "PPM")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith(("I", "F")):
                # More than 8 bits. Elsewhere the brightest value can be anything.
                if not known:
                    raise ValueError(f"its range of brightness is not known, mode {image.mode}; "
                                     "save it with 8 bits")
                image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
            if image.has_transparency_data:
                # Convert("RGB") would show the colour that is hidden under a transparent pixel.
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            w, h = image.size
            x, y = (w - min(w, h)) / 2, (h - min(w, h)) / 2
            image = image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR,
                                                box=(x, y, w - x, h - y))
            return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
    # Of a damaged file, Pillow's plug-ins raise nearly anything.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a readable image ({reason}); mend or remove it")


def _key(folder, paths, side):
    """Of the names below `folder`, sizes and times of the files: what is decoded under another key
    may have changed."""
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


def decoded(folder, paths, side):
    """((N, 3, side, side) uint8 of the files `paths` of `folder`, mapped from a file in CACHE,
    digest of their names and pixels).

    Where that is not there, they are decoded into it first. Raises UserError for an image that
    cannot be read, and for a full disk.
    """
    key = _key(folder, paths, side)
    path = CACHE / f"{folder.resolve().parent.name}-{folder.name}-{side}px-{key}.npy"
    shape = len(paths), 3, side, side
    need = f"{math.prod(shape)} bytes ({math.prod(shape) / 2 ** 30:.1f} GiB)"
    try:
        found = _read(path, shape)
        if not found:
            with alone():
                # Another process may have been at it.
                found = _read(path, shape)
                if not found:
                    free = shutil.disk_usage(CACHE).free
                    if free < math.prod(shape):
                        raise OSError(errno.ENOSPC, f"only {free} bytes are free")
                    _decode(folder, paths, shape, path)
                    found = _read(path, shape)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; the decoded images need {need} there; "
                        "make room, or give a smaller --image-size")
    return found


def _read(path, shape):
    """What `decoded` returns, from the file `path`; None where that is not there, or damaged."""
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
    # Read-only, since a private writable map would count against the memory; torch warns.
    with warnings.catch_warnings(action="ignore"):
        return torch.from_numpy(array), digest.hex()[:12]


def alone():
    """A context in which no other process decodes or downloads: it waits for that."""
    try:
        return locked(CACHE / "decoding.lock")
    except filelock.Timeout:
        print(f"waiting for the process that prepares images in {CACHE}", flush=True)
        return locked(CACHE / "decoding.lock", wait=True)


def _decode(folder, paths, shape, path):
    """The images into the file `path`, and after them the digest of their names and pixels."""
    # A killed process left them.
    for left_over in CACHE.glob("*px-*.npy.*.tmp"):
        left_over.unlink()
    print(f"decoding {len(paths)} images into {path}", flush=True)
    # Written, not mapped: a full disk would end a process that writes to a map. Threads, since
    # Pillow decodes without the GIL; so many images at a time that few wait in memory.
    with (replacing(path) as file, ThreadPoolExecutor() as pool,
          warnings.catch_warnings(action="ignore"),
          tqdm(total=len(paths), unit=" images", leave=False, disable=None) as bar):
        header = dict(descr="|u1", fortran_order=False, shape=shape)
        np.lib.format.write_array_header_1_0(file, header)
        hashed = hashlib.sha256()
        for at in range(0, len(paths), 512):
            some = paths[at:at + 512]
            for name, image in zip(some, pool.map(lambda path: read_image(path, shape[-1]), some)):
                file.write(image)
                hashed.update(_name(folder, name) + b"\0")
                hashed.update(image)
                bar.update()
        file.write(hashed.digest())
