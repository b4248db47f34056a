"""Measure a classifier:  python eval.py CHECKPOINT

--predict IMAGE … names the likeliest classes of your own images, --export FILE writes the network
for programs without torch; --table DIR makes a results table of the runs below DIR, and --plot
RUN … draws their curves.

A checkpoint of train.py needs no other flag. Another one needs --model, --dataset and --data-dir.
The name of a torchvision network in its place stands for the published weights; --data-dir is then
the folder of ImageNet. Everything is measured in float32 on the test part, so on a CPU the numbers
are those in the log of a CPU run.
"""
import contextlib
import json
import sys

import torch
import torch.nn.functional as F
import torchvision

from data import DATASETS, PHOTOGRAPHS, load, normalize
from models import MODELS
from support import console
from support.checkpoints import check_finite, load_model
from support.devices import layout, pick_device
from support.errors import UserError
from support.export import export
from support.networks import TORCHVISION
from support.photographs import centre, read_image, stored_side
from support.plots import plot, save
from support.report import cost, in_words, mistakes
from support.settings import Parser, mode_of
from support.tables import tables


@torch.inference_mode()
def predict(model, images, mean, std, batch_size=None, who="the network"):
    """Logits (N, C), float32 and on the images' device, of uint8 images (N, 3, S, S).

    mean, std: of RGB in [0, 1], which the images are normalised by. batch_size: images at a time;
    the default suits the device. who: what to blame for logits that are not finite, with a
    UserError. Leaves the network in eval mode.
    """
    model.eval()
    device = next(model.parameters()).device
    # On a CPU so few that they stay in its cache.
    few = 250 if images.shape[-1] <= 64 else 50
    batch_size = batch_size or (10 * few if device.type == "cuda" else few)
    parts = images.split(batch_size)
    parts = (normalize(part.to(device), mean, std)
             for part in console.progress(parts, len(parts), "measured, batch"))
    logits = [model(x.contiguous(memory_format=layout(device))).float() for x in parts]
    logits = torch.cat(logits)
    check_finite(who, logits)
    return logits.to(images.device)


def measure(logits, labels):
    """{"top1", "top5", "nll", "ece", "n"} of logits (N, C) and labels (N,).

    top1, top5: how often the label is the likeliest class, or among the min(5, C) likeliest, in
    percent. nll: mean of -log p(label), in nats. ece: `calibration_error`. n: the number of images.
    """
    top = logits.topk(min(5, logits.shape[1])).indices              # (N, <=5)
    right = top == labels[:, None]
    return {
        "top1": 100 * right[:, 0].double().mean().item(),
        "top5": 100 * right.any(1).double().mean().item(),
        "nll": F.cross_entropy(logits, labels).item(),
        "ece": calibration_error(logits, labels),
        "n": len(labels),
    }


def calibration_error(logits, labels, bins=15):
    """Expected calibration error in percent (Guo et al., ICML 2017): |confidence - accuracy| in
    each of `bins` equal ranges of confidence, averaged over the N rows that lie in them."""
    confidence, right = F.softmax(logits, 1).amax(1).double(), logits.argmax(1) == labels    # (N,)
    bin_of = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
    excess = torch.zeros(bins, dtype=torch.float64, device=logits.device)
    excess = excess.index_add(0, bin_of, confidence - right.double())
    return 100 * excess.abs().sum().item() / len(labels)


def inheritance(student_logits, teacher_logits, labels):
    """What a student makes of its teacher's errors. logits: (N, C) each; labels: (N,).

    teacher_top1: the teacher's accuracy, in percent. agreement: how often both say the same class,
    in percent. The others are counts: of the teacher's errors, of those where the student says the
    teacher's wrong class too, and of those where it says the label.
    """
    student, teacher = student_logits.argmax(1), teacher_logits.argmax(1)
    wrong = teacher != labels
    return {
        "teacher_top1": 100 * (~wrong).double().mean().item(),
        "agreement": 100 * (student == teacher).double().mean().item(),
        "teacher_errors": int(wrong.sum()),
        "teacher_errors_made": int((wrong & (student == teacher)).sum()),
        "teacher_errors_avoided": int((wrong & (student == labels)).sum()),
    }


# --- The command line -----------------------------------------------------------------------------

def evaluate(args):
    """`measure` and `mistakes` of the checkpoint on its test part; where a teacher is given,
    `inheritance` too, and what `comparison` takes of both, else `cost`."""
    device = pick_device(args.device or "auto")
    # Loaded a first time to learn the data set, and again below to be checked against it.
    _, checkpoint = load_model(args.checkpoint, args.model)
    dataset = args.dataset or checkpoint.get("dataset")
    if dataset is None:
        raise UserError(f"{args.checkpoint}: does not say which data it was trained on; give "
                        "--dataset and --data-dir")
    size = 224 if args.model in TORCHVISION and dataset in PHOTOGRAPHS else None
    data = load(dataset, args.data_dir or checkpoint.get("data_dir", "data"),
                args.image_size or checkpoint.get("image_size", size), train=False)
    images, labels = data.test

    def look_at(path, name):
        model, checkpoint = load_model(path, name, data)
        logits = predict(model.to(device), images, data.mean, data.std, who=path)
        name, top1 = checkpoint.get("architecture", name), measure(logits, labels)["top1"]
        return logits, dict(name=name, top1=top1) | cost(model, images.shape[-1])
    logits, student = look_at(args.checkpoint, args.model)
    report = measure(logits, labels)
    if args.teacher_checkpoint:
        theirs, teacher = look_at(args.teacher_checkpoint, args.teacher)
        report |= inheritance(logits, theirs, labels) | dict(comparison=dict(
            teacher=teacher, student=student, C=len(data.classes), part="test", device=device.type))
    else:
        report |= {k: v for k, v in student.items() if k != "name"}
    return report | mistakes(logits, labels, names_of(dataset, data.classes))


def names_of(dataset, classes):
    """The classes' names; ImageNet's folders are called by numbers."""
    return (torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"]
            if dataset == "imagenet" else classes)


def classify(args):
    """[{"file", "classes": [[name, probability], …]}]: the five likeliest classes of each image."""
    device = pick_device(args.device or "auto")
    model, checkpoint = load_model(args.checkpoint)
    names = names_of(checkpoint.get("dataset"), checkpoint.get("classes"))
    if names is None or "mean" not in checkpoint:
        raise UserError(f"--predict: {args.checkpoint} does not say its classes; give a file of "
                        "train.py, or the name of a torchvision network")
    size = checkpoint["image_size"]
    side = stored_side(size) if checkpoint["dataset"] in PHOTOGRAPHS else size
    images = torch.stack([torch.from_numpy(read_image(path, side)) for path in args.predict])
    logits = predict(model.to(device), centre(images, size), checkpoint["mean"], checkpoint["std"],
                     who=args.checkpoint)
    probabilities, classes = logits.softmax(1).topk(min(5, len(names)))               # (N, <=5)
    return [dict(file=path, classes=[[names[k], p] for k, p in zip(*row)])
            for path, *row in zip(args.predict, classes.tolist(), probabilities.tolist())]


def make_parser():
    parser = Parser("eval.py", None, __doc__)
    add = parser.add_argument
    add("checkpoint", nargs="?", help="last.pt or best.pt of a run, its folder, which stands for "
        "last.pt, a foreign state dict, or the name of a network of torchvision.models, as "
        "published")
    add("--model", metavar="NAME", help=f"architecture of a foreign checkpoint: "
        f"{', '.join(MODELS)}, or a classifier of torchvision.models")
    add("--dataset", metavar="NAME", help=", ".join(DATASETS))
    add("--data-dir", metavar="DIR")
    add("--image-size", type=int, metavar="PX", help="side of photographs for a foreign "
        "checkpoint; default 64, for torchvision's networks 224")
    add("--predict", nargs="+", metavar="IMAGE", help="the five likeliest classes of each image")
    add("--teacher-checkpoint", metavar="FILE", help="also compare with this teacher")
    add("--teacher", metavar="NAME", help="architecture of a foreign teacher")
    add("--export", metavar="FILE", help="write an ONNX file that takes RGB images in [0, 1], any "
        "number at a time; needs the packages onnx and onnxscript")
    add("--device", metavar="NAME", help="auto, cpu, cuda or mps; default auto")
    add("--json", action="store_true", help="print one JSON object")
    add("--table", metavar="DIR", help="print results tables of the finished runs "
        "DIR/<row>/<seed>, and in which settings the rows differ; without folders named teacher-…")
    add("--against", metavar="ROW", help="compare each row with this one instead of the row above")
    add("--plot", nargs="+", metavar="RUN", help="draw the curves of runs over each other; the "
        "folder of several seeds stands for their mean")
    add("--output", metavar="FILE", help="the PNG file of --plot; default curves.png, here; it "
        "replaces a file of an earlier --plot, and no other")
    return parser


def main():
    parser = make_parser()
    with console.one_line_errors(parser):
        args = parser.parse_args()
        mode = mode_of(args)
        if mode == "table":
            print(tables(args.table, args.against))
        elif mode == "plot":
            path = args.output or "curves.png"
            save(plot(args.plot), path)
            print(f"drawn: {path}")
        elif mode == "export":
            print(export(args.checkpoint, args.export, args.model, args.dataset, args.image_size))
        else:
            # With --json, standard output is for the JSON alone.
            with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
                report = classify(args) if mode == "predict" else evaluate(args)
            if args.json:
                print(json.dumps(report))
            elif mode == "predict":
                for image in report:
                    lines = (f"{100 * p:10.2f} %  {name}" for name, p in image["classes"])
                    print(image["file"], *lines, sep="\n")
            else:
                print(in_words(report))


if __name__ == "__main__":
    main()
