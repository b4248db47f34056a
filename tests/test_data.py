"""Each augmentation against Pillow, pixel by pixel; the views of an epoch; the data sets."""
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torchvision import transforms

import data

B = 150


@pytest.fixture(scope="module")
def images():
    """Smooth and noisy, bright and dark, and one flat image: (B, 3, 32, 32) uint8."""
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(B, 3, 4, 4, generator=g)
    smooth = torch.nn.functional.interpolate(coarse, 32, mode="bilinear")
    images = 255 * smooth + 8 * torch.randn(B, 3, 32, 32, generator=g)
    images[::3] *= 0.3
    images[0] = 77
    return images.clamp(0, 255).byte()


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
    assert set(data.OPS) == set(PILLOW) and len(PILLOW) == 14
    for name, expected in RANGES.items():
        assert data.OPS[name][:2] == expected


@pytest.mark.parametrize("name", PILLOW)
def test_each_operation_is_pillows(images, name):
    low, high, _ = data.OPS[name]
    u = torch.rand(B)
    ours = data.randaugment(images, torch.full((B,), list(data.OPS).index(name)), u)
    values = (low + (high - low) * u).tolist()
    theirs = from_pil([PILLOW[name](image, v) for image, v in zip(to_pil(images), values)])
    assert torch.equal(ours, theirs)
    assert name == "identity" or not torch.equal(ours, images)


def test_mixed_operations_reach_their_own_images(images):
    ops, u = torch.randint(len(data.OPS), (B,)), torch.rand(B)
    together = data.randaugment(images, ops, u)
    for i in range(B):
        alone, = data.randaugment(images[i:i + 1], ops[i:i + 1], u[i:i + 1])
        assert torch.equal(together[i], alone)


def test_cutout_is_pillows_rectangle(images):
    side, centre = 16 * torch.rand(B), 32 * torch.rand(B, 2)
    expected = to_pil(images)
    for image, v, (x, y) in zip(expected, side.tolist(), centre.tolist()):
        x, y = int(max(0, x - v / 2)), int(max(0, y - v / 2))
        ImageDraw.Draw(image).rectangle((x, y, min(32, x + v), min(32, y + v)), (125, 123, 114))
    assert torch.equal(data.cutout(images, side, centre), from_pil(expected))


def test_the_weak_view_is_a_padded_crop_and_a_mirror(images):
    offset, mirror = torch.randint(-4, 5, (B, 2)), torch.rand(B) < 0.5
    expected = []
    for image, (x, y), flip in zip(to_pil(images), offset.tolist(), mirror.tolist()):
        image = ImageOps.expand(image, 4).crop((4 + x, 4 + y, 36 + x, 36 + y))
        expected.append(ImageOps.mirror(image) if flip else image)
    assert torch.equal(data.crop_and_flip(images, offset, mirror), from_pil(expected))


def test_the_draws_have_the_papers_ranges():
    numbers = data.draw(20_000, 32, True, torch.Generator().manual_seed(0))
    assert numbers["offset"].unique().tolist() == list(range(-4, 5))
    assert numbers["mirror"].double().mean().item() == pytest.approx(0.5, abs=0.02)
    assert torch.bincount(numbers["ops"].flatten()).min() > 0.9 * 40_000 / 14
    assert 0 <= numbers["side"].min() < 0.1 and 15.9 < numbers["side"].max() < 16
    assert not data.draw(100, 32, False, torch.Generator())["mirror"].any()


def test_the_weak_view_of_photographs_is_torchvisions_resized_crop():
    images = torch.randint(256, (40, 3, 37, 37), dtype=torch.uint8)
    box = data.draw_box(40, 37, 0.08, torch.Generator().manual_seed(0))
    mirror = torch.arange(40) % 2 == 1
    ours = data.resized_crop(images, box, mirror, 32)
    for image, (x, y, w, h), flip, view in zip(images, box.int().tolist(), mirror, ours):
        theirs = transforms.functional.resized_crop(image, y, x, h, w, [32, 32], antialias=False)
        theirs = theirs.flip(2) if flip else theirs
        assert (view.int() - theirs.int()).abs().max() <= 1
    assert ours.dtype == torch.uint8 and ours.shape == (40, 3, 32, 32)


def test_its_boxes_are_drawn_as_torchvision_draws_them():
    """Means and spreads of x, y, width and height over many draws."""
    n, side = 4000, 256
    ours = data.draw_box(n, side, 0.08, torch.Generator().manual_seed(0))
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
    assert (data.draw_box(9, 1, 0.08, torch.Generator()) == torch.tensor([0, 0, 1, 1])).all()


@pytest.mark.parametrize("size", [16, 224])
def test_views_of_photographs_hold_every_image_once(size):
    side = data.stored_side(size)
    images = torch.arange(14, dtype=torch.uint8).view(14, 1, 1, 1).expand(-1, 3, side, side)
    part = images.contiguous(), torch.arange(14)
    photographs = data.Dataset(part, (data.centre(images, size), part[1]), list("ab"), (0., 0., 0.),
                               (1 / 255,) * 3, True, area=0.35)
    seen = []
    for (weak, strong), labels in data.batches(photographs, 12, "both", seed=0, epoch=1):
        assert weak.shape == strong.shape == (len(labels), 3, size, size)
        assert torch.equal(weak.round().mean((1, 2, 3)).long(), labels)
        seen += labels.tolist()
    assert sorted(seen) == list(range(14)) and seen != sorted(seen)


def small(images, flip=True):
    return data.Dataset((images, torch.arange(len(images))), (images, torch.arange(len(images))),
                        list("ab"), (.5, .4, .3), (.2, .3, .1), flip)


def test_an_epoch_holds_every_image_once_and_keeps_the_tail(images):
    sizes, seen = [], []
    for views, labels in data.batches(small(images), 64, "both", seed=0, epoch=1):
        sizes.append(len(labels))
        seen += labels.tolist()
        assert [tuple(view.shape) for view in views] == [(len(labels), 3, 32, 32)] * 2
        assert not torch.equal(*views)
    assert sizes == [64, 64, 22] and sorted(seen) == list(range(B)) and seen != sorted(seen)


def test_views_are_a_function_of_seed_and_epoch(images):
    def epoch(seed, epoch, views="both"):
        batches = data.batches(small(images), 64, views, seed, epoch)
        return [torch.cat(v) for v in zip(*(views for views, _ in batches))]
    assert all(map(torch.equal, epoch(3, 5), epoch(3, 5)))
    for other in ((3, 6), (4, 5)):
        assert not torch.equal(epoch(3, 5)[0], epoch(*other)[0])
    assert torch.equal(epoch(3, 5)[0], epoch(3, 5, "weak")[0])


def test_views_are_those_of_the_image_they_are_labelled_with(images):
    plain = data.normalize(images, (.5, .4, .3), (.2, .3, .1))
    for (weak,), labels in data.batches(small(images), 64, "weak", seed=0, epoch=1):
        for view, label in zip(weak, labels):
            middle = view[:, 8:24, 8:24]
            difference = [(image - plain[label][:, y:y + 16, x:x + 16]).abs().max()
                          for image in (middle, middle.flip(2))
                          for y in range(4, 13) for x in range(4, 13)]
            assert min(difference) < 1e-6


def test_normalize():
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = torch.tensor([(0 - .5) / .2, (1 - .4) / .3, (.2 - .3) / .1]).view(1, 3, 1, 1)
    torch.testing.assert_close(data.normalize(images, (.5, .4, .3), (.2, .3, .1)), expected)


def test_glyphs_are_seeded_balanced_and_light_on_dark():
    images, labels = data.render_glyphs(2000, seed=5)
    again, same = data.render_glyphs(2000, seed=5)
    assert torch.equal(images, again) and torch.equal(labels, same)
    assert not torch.equal(images, data.render_glyphs(2000, seed=6)[0])
    assert len(data.GLYPHS) == 47 and len(set("".join(data.GLYPHS))) == len("".join(data.GLYPHS))
    assert torch.bincount(labels, minlength=47).min() > 15
    S = data.GLYPHS_SIZE
    centre = images[:, :, S // 4:-S // 4, S // 4:-S // 4].float().mean()
    corners = images[:, :, ::S - 1, ::S - 1].float().mean()
    assert images.shape[2:] == (S, S) and centre > corners


def test_the_glyphs_cache_is_used_and_mended(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "GLYPHS_TRAIN", 100)
    monkeypatch.setattr(data, "GLYPHS_TEST", 50)
    first = data.load("glyphs", tmp_path)
    assert "rendering" in capsys.readouterr().out
    second = data.load("glyphs", tmp_path)
    assert "rendering" not in capsys.readouterr().out
    assert torch.equal(first.train[0], second.train[0])
    assert torch.equal(first.test[1], second.test[1])
    assert len(first.train[1]) == 100 and len(first.test[1]) == 50 and not first.flip
    cache, = tmp_path.iterdir()
    cache.write_bytes(cache.read_bytes()[:1000])
    assert torch.equal(data.load("glyphs", tmp_path).train[0], first.train[0])
    assert "rendering" in capsys.readouterr().out


def folder(root, layout):
    """Write {path: PIL image} below root."""
    for name, image in layout.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(root / name)
    return root


def test_a_folder_of_any_modes_and_sizes(tmp_path):
    grey16 = Image.fromarray(np.full((40, 60), 51 * 256, np.uint16))
    root = folder(tmp_path, {
        "train/cat/rgb.png": Image.new("RGB", (50, 30), (255, 0, 102)),
        "train/cat/grey.jpg": Image.new("L", (16, 16), 200),
        "train/dog/alpha.png": Image.new("RGBA", (9, 9), (10, 20, 30, 40)),
        "train/dog/deep.png": grey16,
        "train/dog/palette.gif": Image.new("P", (8, 8)),
        "val/cat/one.png": Image.new("1", (20, 20), 1),
        "val/dog/two.webp": Image.new("RGB", (200, 20))})
    loaded = data.load("folder", root, image_size=21)
    assert loaded.classes == ["cat", "dog"] and loaded.flip and loaded.area == 0.35
    # In a random order, with room to crop from.
    (images, labels), (tests, _) = loaded.train, loaded.test
    assert images.shape == (5, 3, 24, 24) and sorted(labels.tolist()) == [0, 0, 1, 1, 1]
    assert tests.shape == (2, 3, 21, 21)
    found = sorted(zip(labels.tolist(), images[:, :, 5, 5].tolist()))
    assert (0, [255, 0, 102]) in found and (1, [51] * 3) in found and (1, [217, 218, 220]) in found
    assert tests[0].unique().tolist() == [255]
    assert (loaded.mean, loaded.std) == data.IMAGENET[1:]
    assert data.load("folder", root, 21, train=False).train is None


def test_cifar_as_an_image_folder_has_the_published_statistics(tmp_path):
    folder(tmp_path, {f"{part}/{k}/0.png": Image.new("RGB", (32, 32), (k, 0, 0))
                      for part in ("train", "test") for k in range(10)})
    loaded = data.load("cifar10", tmp_path)
    assert loaded.mean == (0.4914, 0.4822, 0.4465)
    assert loaded.train[1].tolist() == list(range(10)) and loaded.flip


def test_cifar_through_torchvision(tmp_path, monkeypatch):
    class Fake:
        def __init__(self, root, train, download):
            self.data, self.targets = np.full((4, 32, 32, 3), 7, np.uint8), [0, 1, 2, 3]
            self.classes = [str(k) for k in range(100)]
    monkeypatch.setattr(data.datasets, "CIFAR100", Fake)
    loaded = data.load("cifar100", tmp_path)
    assert loaded.train[0].shape == (4, 3, 32, 32) and loaded.test[1].tolist() == [0, 1, 2, 3]
    assert loaded.std == (0.2675, 0.2565, 0.2761)
