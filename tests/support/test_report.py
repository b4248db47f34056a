"""What is said of teacher and student, and of the images that are misread."""
import json
import time
from pathlib import Path

import pytest
import torch

import eval as evaluation
import train
from support import report
from support.checkpoints import load_model


def test_the_cost_of_a_network(color_teacher, monkeypatch):
    monkeypatch.setattr(report, "time", time)
    model, _ = load_model(color_teacher)
    found = report.cost(model.train(), 16)
    weights = [p.numel() for p in model.parameters()]
    # Of batch norm two float32 buffers a channel, and an int64.
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    size = 4 * sum(weights) + sum(8 * norm.num_features + 8 for norm in norms)
    assert found["parameters"] == sum(weights)
    assert found["megabytes"] == pytest.approx(size / 1e6)
    assert found["milliseconds"] > 0 and not model.training


COST = dict(parameters=300_000, megabytes=1.2, milliseconds=0.9)
HALF = dict(parameters=120_000, megabytes=0.5, milliseconds=0.6)


@pytest.mark.parametrize("top1, C, warning", [
    ((84.5, 82.25), 47, None), ((84.5, 83.6), 47, "hardly better than the student"),
    ((84.5, 90), 47, "hardly better"), ((84.5, 4.2), 47, "no better than 4.26 %, near chance"),
    ((84.5, 60), 2, "no better than 60.00 %, near chance"), ((84.5, 61), 2, None),
    # Not both.
    ((4.5, 4.2), 47, "it has learnt nothing")])
def test_teacher_and_student_side_by_side(top1, C, warning):
    teacher, student = (dict(name=name, top1=value) | cost for name, value, cost in
                        zip(("big", "small"), top1, (COST, HALF)))
    first, second, third, *rest = report.comparison(teacher, student, C, "val", "cpu").splitlines()
    assert first == (f"teacher   big: {top1[0]:.2f} % val top-1, 300,000 parameters, 1.20 MB, "
                     "0.90 ms an image")
    assert second == (f"student   small: {top1[1]:.2f} % val top-1, 120,000 parameters, 0.50 MB, "
                      "0.60 ms an image")
    assert third == ("ratio     teacher to student: 2.5 in size, 1.5 in time (one image at a time "
                     f"on cpu); the teacher leads by {top1[0] - top1[1]:.2f} points")
    assert len(rest) == bool(warning)
    assert not warning or rest[0].startswith("warning   the ") and warning in rest[0]


def test_a_run_ends_with_teacher_and_student(base, color_teacher, command):
    status, out, err = command(train, *base, "--teacher-checkpoint", color_teacher.parent)
    assert status == 0, err
    *lines, last = out.strip().split("\n\n")[-1].splitlines()
    # Whether the teacher is worth while depends on what both have learnt.
    lines = [line for line in lines if not line.startswith("warning")]
    assert [line.split()[0] for line in lines] == ["teacher", "student", "ratio"]
    top1 = json.loads(open("run/metrics.jsonl").readlines()[-1])["test_top1"]
    assert lines[1].startswith(f"student   resnet8: {top1:.2f} % test top-1, ")
    assert last.startswith(f"last epoch {top1:.2f} %")
    # Eval.py says the same, but for what the clock says.
    timeless = [line.split(" MB")[0].split(" in time")[0][:-4] for line in lines]
    status, out, err = command(evaluation, "run", "--teacher-checkpoint", color_teacher.parent)
    assert status == 0, err
    for line in timeless:
        assert f"\n{line}" in out
    status, out, _ = command(evaluation, "run", "--teacher-checkpoint", color_teacher, "--json")
    found = json.loads(out)
    teacher, student = (found["comparison"][who] for who in ("teacher", "student"))
    assert student.keys() == teacher.keys() == {
        "name", "top1", "parameters", "megabytes", "milliseconds"}
    assert student["top1"] == found["top1"] == top1
    assert teacher["top1"] == found["teacher_top1"] and found["comparison"]["C"] == 3


def test_a_run_without_a_teacher_compares_nothing(base, command):
    flags = base[:base.index("--teacher")] + base[base.index("--device"):]
    status, out, err = command(train, *flags, "--method", "ce")
    assert status == 0 and "ratio" not in out, err
    # eval.py says what the network alone costs.
    status, out, err = command(evaluation, *Path().rglob("last.pt"), "--json")
    assert status == 0, err
    assert {"parameters", "megabytes", "milliseconds"} <= json.loads(out).keys()


def test_mistakes_against_plain_python():
    labels, C = torch.randint(6, (300,)), 7
    logits = torch.randn(300, C)
    names = [f"class {c}" for c in range(C)]
    found = report.mistakes(logits, labels, names)
    pairs = list(zip(labels.tolist(), logits.argmax(1).tolist()))
    # The last class has no image.
    classes = {names[c]: (100 * pairs.count((c, c)) / n, n) for c in range(6)
               if (n := sum(label == c for label, _ in pairs))}
    assert {name: (accuracy, n) for name, accuracy, n in found["classes"]} == classes
    confusions = {(names[a], names[b]): pairs.count((a, b)) for a, b in set(pairs) if a != b}
    assert {(a, b): n for a, b, n in found["confusions"]} == confusions
    accuracies, counts = ([row[k] for row in found[key]] for key, k in (("classes", 1),
                                                                       ("confusions", 2)))
    assert accuracies == sorted(accuracies) and counts == sorted(counts, reverse=True)
    text = report.in_words(dict(top1=1.0, n=300) | found).splitlines()
    name, accuracy, n = found["classes"][0]
    assert text[:2] == [f"{'top1':24s}{1:10.4f}", f"{'n':24s}{300:10d}"]
    assert text[4] == f"{accuracy:10.2f} % of {n:<6d} {name}"
    a, b, n = found["confusions"][0]
    assert text[9:11] == ["most often confused", f"{n:10d} times     {a} read as {b}"]
    assert len(text) == 15


def test_images_that_are_all_read_right():
    found = report.mistakes(torch.eye(3), torch.arange(3), ["a", "b", "c"])
    assert found == dict(classes=[[name, 100, 1] for name in "abc"], confusions=[])
    assert report.in_words(found).splitlines()[-1] == "    100.00 % of 1      c"


def test_the_classes_of_imagenet_by_their_names(published, imagenet, command):
    published("shufflenet_v2_x0_5", bias=1.0)
    _, out, err = command(evaluation, "shufflenet_v2_x0_5", "--dataset", "imagenet", "--data-dir",
                          imagenet, "--json")
    assert json.loads(out)["classes"] == [["tench", 100, 20]], err
