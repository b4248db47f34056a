"""The rendered characters, and the file that they are kept in."""
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from support import glyphs


def test_glyphs_are_seeded_balanced_and_light_on_dark():
    images, labels = glyphs.render(2000, seed=5)
    again, same = glyphs.render(2000, seed=5)
    assert torch.equal(images, again) and torch.equal(labels, same)
    assert not torch.equal(images, glyphs.render(2000, seed=6)[0])
    characters = "".join(glyphs.CLASSES)
    assert len(glyphs.CLASSES) == 47 and len(set(characters)) == len(characters)
    assert torch.bincount(labels, minlength=47).min() > 15
    S = glyphs.SIDE
    centre = images[:, :, S // 4:-S // 4, S // 4:-S // 4].float().mean()
    corners = images[:, :, ::S - 1, ::S - 1].float().mean()
    assert images.shape[2:] == (S, S) and centre > corners


def test_the_glyphs_cache_is_used_and_mended(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(glyphs, "N_TRAIN", 100)
    monkeypatch.setattr(glyphs, "N_TEST", 50)
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


@pytest.mark.parametrize("content", ["other count", "other type", "labels", "text", "array"])
def test_a_damaged_cache_of_glyphs_is_rendered_anew(easy_glyphs, content, capsys):
    whole = data.load("glyphs", easy_glyphs)
    path = next(Path(easy_glyphs).glob("glyphs-*.npz"))
    arrays = dict(np.load(path))
    if content == "text":
        path.write_text("hello")
    elif content == "array":
        np.save(open(path, "wb"), arrays["train_x"])
    else:
        arrays |= {"other count": dict(train_x=arrays["train_x"][:5]),
                   "other type": dict(test_x=arrays["test_x"].astype(np.float32)),
                   "labels": dict(test_y=arrays["test_y"] + 40)}[content]
        np.savez(path, **arrays)
    again = data.load("glyphs", easy_glyphs)
    assert "rendering" in capsys.readouterr().out
    parts = zip(whole.train + whole.test, again.train + again.test)
    assert all(torch.equal(a, b) for a, b in parts)


def test_a_fifth_of_the_labels_can_be_wrong():
    labels = torch.arange(47).repeat(5000)
    found = glyphs.mislabelled(labels)
    wrong = found != labels
    assert abs(wrong.float().mean() - 0.2) < 0.01 and found.min() >= 0 and found.max() < 47
    # Every class is taken for every other.
    assert len(set(zip(labels[wrong].tolist(), found[wrong].tolist()))) == 47 * 46


def test_only_training_labels_are_wrong(easy_glyphs):
    clean, noisy = (data.load(name, easy_glyphs) for name in ("glyphs", "glyphs-noisy"))
    assert torch.equal(clean.train[0], noisy.train[0])
    assert torch.equal(clean.test[1], noisy.test[1])
    assert torch.equal(noisy.train[1], glyphs.mislabelled(clean.train[1]))
    assert not torch.equal(noisy.train[1], clean.train[1])
