"""eval.py: the metrics against plain Python, and its command line."""
import json
import math

import pytest
import torch

import eval as evaluation
from models import create_model


def test_measure_against_plain_python():
    logits, labels = 2 * torch.randn(300, 8, dtype=torch.float64), torch.randint(8, (300,))
    report = evaluation.measure(logits, labels)
    bins, right1, right5, nll = [[0, 0.0, 0] for _ in range(15)], 0, 0, 0.0
    for row, label in zip(logits.tolist(), labels.tolist()):
        p = [math.exp(v) for v in row]
        p = [v / sum(p) for v in p]
        order = sorted(range(8), key=lambda c: -p[c])
        right1, right5 = right1 + (order[0] == label), right5 + (label in order[:5])
        nll -= math.log(p[label])
        cell = bins[min(14, math.ceil(max(p) * 15) - 1)]
        cell[0], cell[1], cell[2] = cell[0] + 1, cell[1] + max(p), cell[2] + (order[0] == label)
    ece = sum(abs(confidence - right) for _, confidence, right in bins) / 300
    expected = dict(top1=right1 / 3, top5=right5 / 3, nll=nll / 300, ece=100 * ece, n=300)
    assert report == pytest.approx(expected)


def test_top5_of_fewer_classes_is_everything():
    assert evaluation.measure(torch.randn(20, 3), torch.randint(3, (20,)))["top5"] == 100


def test_inheritance_counts():
    teacher, student = torch.eye(3)[[0, 1, 2, 2, 2]], torch.eye(3)[[0, 1, 2, 0, 1]]
    report = evaluation.inheritance(student, teacher, torch.tensor([0, 2, 1, 0, 0]))
    assert report == {"teacher_top1": 20, "agreement": pytest.approx(60), "teacher_errors": 4,
                      "teacher_errors_made": 2, "teacher_errors_avoided": 1}


def test_a_foreign_checkpoint_is_measured_like_our_own(colors, color_teacher, tmp_path, command):
    torch.save(torch.load(color_teacher, weights_only=True)["model"], tmp_path / "bare.pt")
    own = json.loads(command(evaluation, color_teacher, "--json")[1])
    status, out, err = command(evaluation, color_teacher, "--teacher-checkpoint", color_teacher,
                               "--json")
    assert status == 0
    assert json.loads(out)["agreement"] == 100
    assert json.loads(out)["teacher_errors_avoided"] == 0
    assert set(own) == {"top1", "top5", "nll", "ece", "n", "classes", "confusions",
                        "parameters", "megabytes", "milliseconds"}
    assert own["n"] == 60
    status, out, err = command(evaluation, color_teacher)
    assert status == 0 and f"{own['top1']:.4f}" in out


def test_a_published_network_is_measured_by_its_name(published, imagenet, command, tmp_path):
    published("shufflenet_v2_x0_5", bias=1.0)
    arguments = ("shufflenet_v2_x0_5", "--dataset", "imagenet", "--data-dir")
    status, out, err = command(evaluation, *arguments, imagenet, "--json")
    report = json.loads(out)
    assert status == 0 and report["top1"] == 100 and report["n"] == 20 and "decoding" in err
    assert next((tmp_path / "data").glob("*-val-256px-*.npy")).stat().st_size > 20 * 3 * 256 ** 2
    status, out, err = command(evaluation, "resnet18", *arguments[1:], imagenet)
    *_, line = err.splitlines()
    assert status == 2 and line.startswith("eval.py: resnet18: cannot load resnet18-f37072fd.pth")


def test_predict_names_the_likeliest_classes(published, colors, color_teacher, command, tmp_path):
    files = [str(colors / f"val/{name}/{k}.png") for name in ("red", "blue") for k in (3, 4)]
    status, out, err = command(evaluation, color_teacher, "--predict", *files, "--json")
    report = json.loads(out)
    assert status == 0 and [image["file"] for image in report] == files
    for image, name in zip(report, ("red", "red", "blue", "blue")):
        assert image["classes"][0][0] == name and len(image["classes"]) == 3
        probabilities = [p for _, p in image["classes"]]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1)
    status, out, err = command(evaluation, color_teacher, "--predict", *files, "--device", "cpu")
    assert status == 0 and out.splitlines()[0] == files[0]
    assert out.splitlines()[1] == f"{100 * report[0]['classes'][0][1]:10.2f} %  red"
    # ImageNet's classes have names of their own, and five are shown.
    published("shufflenet_v2_x0_5", bias=9.0)
    status, out, _ = command(evaluation, "shufflenet_v2_x0_5", "--predict", files[0])
    assert status == 0 and out.splitlines()[1].endswith("%  tench") and len(out.splitlines()) == 6


@pytest.mark.parametrize("files, culprit", [
    (["missing.png"], "missing.png"), (["notes.txt"], "notes.txt"), (["."], "."),
    ([], "--predict")])
def test_predict_names_what_is_no_image(color_teacher, command, files, culprit):
    open("notes.txt", "w").write("hello")
    status, _, err = command(evaluation, color_teacher, "--predict", *files)
    assert status == 2 and culprit in err and err.count("\n") == 1
    torch.save(create_model("resnet8", 3).state_dict(), "bare.pt")
    status, _, err = command(evaluation, "bare.pt", "--predict", "x.png")
    assert status == 2 and err.startswith("eval.py: bare.pt: does not say which network")
