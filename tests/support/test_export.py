"""The exported file gives eval.py's logits in a program without torch."""
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_bad_input import refused

import data
import eval as evaluation
import train
from models import create_model
from support.checkpoints import load_model


@pytest.fixture
def session():
    pytest.importorskip("onnxscript")
    return pytest.importorskip("onnxruntime").InferenceSession


def logits_of(session, path, images):
    """Of uint8 images (N, 3, S, S), in batches of one and of five."""
    model = session(path, providers=["CPUExecutionProvider"])
    images = images.numpy().astype(np.float32) / 255
    alone = np.concatenate([model.run(None, {"images": image[None]})[0] for image in images])
    by_five = np.concatenate([model.run(None, {"images": images[at:at + 5]})[0]
                              for at in range(0, len(images), 5)])
    np.testing.assert_allclose(alone, by_five, rtol=1e-4, atol=1e-4)
    return torch.from_numpy(by_five)


def test_the_file_gives_the_logits_of_eval(session, short, colors, command):
    train.run(short(method="ce", epochs=1, image_size=56), "run")
    before = set(Path().iterdir())
    status, out, err = command(evaluation, "run", "--export", "student.onnx")
    assert status == 0 and not err, err
    # One file, which holds the weights.
    assert set(Path().iterdir()) - before == {Path("student.onnx")}
    loaded = data.load("folder", colors, 56)
    images = loaded.test[0][::6]
    expected = evaluation.predict(load_model("run")[0], images, loaded.mean, loaded.std)
    found = logits_of(session, "student.onnx", images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert "takes     images (N, 3, 56, 56), any N: RGB from 0 to 1" in out
    assert "ONNX opset " in out and "gives     logits (N, 3)" in out
    # A photograph that is not square, prepared by the words of the message alone.
    assert ("the middle square resized to 64 x 64 pixels (bilinear), of which the middle 56 x 56; "
            "divided by 255, not normalised") in " ".join(out.split())
    # The order of the logits, also for those who have nothing but the file.
    assert "gives     logits (N, 3): blue, green, red\n" in out
    classes = session("student.onnx").get_modelmeta().custom_metadata_map["classes"]
    assert json.loads(classes) == ["blue", "green", "red"]
    pixels = np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8)
    Image.fromarray(pixels).resize((350, 450)).save("photo.png")
    _, out, _ = command(evaluation, "run", "--predict", "photo.png", "--json")
    expected = dict(json.loads(out)[0]["classes"])
    image = Image.open("photo.png").crop((0, 50, 350, 400)).resize((64, 64), Image.BILINEAR)
    image = torch.from_numpy(np.asarray(image.crop((4, 4, 60, 60))).transpose(2, 0, 1).copy())
    p = logits_of(session, "student.onnx", image[None]).softmax(1)[0].tolist()
    assert dict(zip(("blue", "green", "red"), p)) == pytest.approx(expected, abs=1e-4)


def test_a_foreign_file_of_images_that_are_not_cropped(session, command):
    torch.save(create_model("vit_nano", 10).state_dict(), "bare.pt")
    flags = "bare.pt", "--model", "vit_nano", "--export", "out.onnx"
    refused(command(evaluation, *flags), "bare.pt: does not say how its images were normalised")
    refused(command(evaluation, *flags, "--dataset", "folder"), "bare.pt: vit_nano does not take")
    status, out, err = command(evaluation, *flags, "--dataset", "cifar10")
    assert status == 0, err
    assert "resized to 32 x 32 pixels (bilinear); divided by 255" in " ".join(out.split())
    assert "gives     logits (N, 10)\n" in out
    images = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8)
    facts = data.DATASETS["cifar10"]
    expected = evaluation.predict(load_model("bare.pt", "vit_nano")[0], images, facts.mean,
                                  facts.std)
    torch.testing.assert_close(logits_of(session, "out.onnx", images), expected, rtol=1e-4,
                               atol=1e-4)


def test_what_stands_in_the_way_of_an_export(color_teacher, command, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)
        refused(command(evaluation, color_teacher, "--export", "x.onnx"),
                "pip install onnx onnxscript")
    # From here on as if they were there.
    monkeypatch.setitem(sys.modules, "onnxscript", sys)
    shutil.copy(color_teacher, "mine.pt")
    refused(command(evaluation, color_teacher, "--export", "mine.pt"), "--export mine.pt: is there")
    assert Path("mine.pt").read_bytes() == color_teacher.read_bytes()
    refused(command(evaluation, color_teacher, "--export", "no/x.onnx"), "there is no folder no")
    refused(command(evaluation, color_teacher, "--export", "x.onnx", "--device", "cpu"),
            "--device: has no effect with --export")
    refused(command(evaluation, color_teacher, "--export", "x.onnx", "--image-size", 64),
            "is for 16 px; leave out --image-size 64")


def test_a_batch_that_torch_fixes_is_refused(session, color_teacher, command, monkeypatch):
    """As it does without a word where a network calls len() of a batch."""
    real = create_model("resnet8", 3)

    class Fixed(torch.nn.Module):
        def forward(self, x):
            return real.eval()(x).view(len(x), 3)
    monkeypatch.setattr("support.export.load_model", lambda *a: (
        Fixed(), load_model(color_teacher)[1]))
    refused(command(evaluation, color_teacher, "--export", "x.onnx"), "for batches of 2 only")
    assert not Path("x.onnx").exists()
