"""What is said of a student beside its teacher, and of the images that a network misreads."""
import math
import time

import torch

from models import create_model
from support.checkpoints import near_chance


def cost(model, size):
    """{"parameters", "megabytes", "milliseconds"} of a network: its number of weights, the size of
    weights and buffers, and the time that one image, `size` pixels wide, takes on the device where
    the network is: the shortest of as many as fit into a tenth of a second, but of two at
    least. Leaves the network in eval mode."""
    model.eval()
    image = torch.zeros(1, 3, size, size, device=next(model.parameters()).device)
    times = []
    with torch.inference_mode():
        while len(times) < 2 or sum(times) < 0.1:
            start = time.perf_counter()
            # On the CPU, so that a GPU is waited for.
            model(image).cpu()
            times.append(time.perf_counter() - start)
    return dict(parameters=sum(p.numel() for p in model.parameters()),
                megabytes=sum(v.nbytes for v in model.state_dict().values()) / 1e6,
                milliseconds=1000 * min(times))


def training_time(settings, data, device):
    """In how many minutes, rounded up, train.py's settings {name: value} train a student on a
    Dataset: reckoned from one step of a few images on the device."""
    size = settings["image_size"]
    model = create_model(settings["student"], len(data.classes), size).to(device).train()
    # So few that they fit wherever the training itself does.
    batch = torch.zeros(8 if device.type == "cpu" else 16, 3, size, size, device=device)
    for _ in range(2):
        # The first of the two only warms up.
        start = time.perf_counter()
        model(batch).sum().backward()
        # So that a GPU is waited for.
        next(model.parameters()).grad.cpu()
    epoch = (time.perf_counter() - start) * len(data.train[1]) / len(batch)
    return math.ceil(epoch * settings["epochs"] / 60)


def comparison(teacher, student, C, part, device):
    """Lines that set a student beside its teacher, and warn where it was not worth while.

    teacher, student: {"name", "top1"} of each, top-1 in percent on the `part` of C classes, and
    its `cost` on `device`."""
    lines = [f"{who:10s}{n['name']}: {n['top1']:.2f} % {part} top-1, {n['parameters']:,} "
             f"parameters, {n['megabytes']:.2f} MB, {n['milliseconds']:.2f} ms an image"
             for who, n in (("teacher", teacher), ("student", student))]
    size, slowness = (teacher[k] / student[k] for k in ("parameters", "milliseconds"))
    lead = teacher["top1"] - student["top1"]
    lines.append(f"ratio     teacher to student: {size:.1f} in size, {slowness:.1f} in time (one "
                 f"image at a time on {device}); the teacher leads by {lead:.2f} points")
    if student["top1"] <= near_chance(C):
        lines.append(f"warning   the student is no better than {near_chance(C):.2f} %, near "
                     "chance: it has learnt nothing; try a tenth of the learning rate")
    elif lead < 1 and teacher["top1"] < 99:
        lines.append("warning   the teacher is hardly better than the student, which has little "
                     "to learn from it; try a better one")
    return "\n".join(lines)


def in_words(report):
    """What eval.py prints of its report: numbers, the `comparison`, five of `mistakes` each."""
    lines = [f"{key:24s}{value:{'10.4f' if isinstance(value, float) else '10d'}}"
             for key, value in report.items() if isinstance(value, (int, float))]
    if "comparison" in report:
        lines.append(comparison(**report["comparison"]))
    lines += ["", "worst classes", *(f"{accuracy:10.2f} % of {n:<6d} {name}"
                                     for name, accuracy, n in report["classes"][:5])]
    if report["confusions"]:
        lines += ["most often confused", *(f"{n:10d} times     {name} read as {answer}"
                                           for name, answer, n in report["confusions"][:5])]
    return "\n".join(lines)


def mistakes(logits, labels, names):
    """Of logits (N, C) and labels (N,): {"classes": [[name, accuracy in percent, images], …], the
    worst first, "confusions": [[name, the wrong answer, images], …], the most frequent first}.
    names: of the C classes. A class without an image is left out."""
    C = len(names)
    counts = torch.bincount(labels * C + logits.argmax(1), minlength=C * C).view(C, C)
    n, right = counts.sum(1), counts.diagonal()                                     # (C,) each
    classes = [[names[c], 100 * right[c].item() / n[c].item(), n[c].item()]
               for c in n.nonzero().flatten().tolist()]
    wrong = counts - right.diag()
    confusions = [[names[a], names[b], wrong[a, b].item()] for a, b in wrong.nonzero().tolist()]
    return dict(classes=sorted(classes, key=lambda row: row[1]),
                confusions=sorted(confusions, key=lambda row: -row[2]))
