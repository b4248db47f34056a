"""The views of an epoch, and the data sets."""
import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image

import data
from support.photographs import centre, stored_side


def test_the_draws_have_the_papers_ranges():
    numbers = data.draw(20_000, 32, True, torch.Generator().manual_seed(0))
    assert numbers["offset"].unique().tolist() == list(range(-4, 5))
    assert numbers["mirror"].double().mean().item() == pytest.approx(0.5, abs=0.02)
    assert torch.bincount(numbers["ops"].flatten()).min() > 0.9 * 40_000 / 14
    assert 0 <= numbers["side"].min() < 0.1 and 15.9 < numbers["side"].max() < 16
    assert not data.draw(100, 32, False, torch.Generator())["mirror"].any()


@pytest.mark.parametrize("size", [16, 224])
def test_views_of_photographs_hold_every_image_once(size):
    side = stored_side(size)
    images = torch.arange(14, dtype=torch.uint8).view(14, 1, 1, 1).expand(-1, 3, side, side)
    part = images.contiguous(), torch.arange(14)
    photographs = data.Dataset(part, (centre(images, size), part[1]), list("ab"), (0., 0., 0.),
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
    assert sizes == [64, 64, 22] and sorted(seen) == list(range(150)) and seen != sorted(seen)


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


def test_cifar_as_an_image_folder_has_the_published_statistics(tmp_path):
    write_images(tmp_path, {f"{part}/{k}/0.png": Image.new("RGB", (32, 32), (k, 0, 0))
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
