"""Train a student:  python train.py --method sld   (or ce, kd, dkd, rld, mlkd; ce has no teacher).

Reads from top to bottom: the settings, their recipes, the learning rate, the step, an epoch, a run,
the teacher. A run leaves its logs and checkpoints in runs/<data>-<method>-<student>/seed<seed>.
In a notebook:  history = train.run(train.Settings(method="kd", epochs=2))
"""
import dataclasses
import functools
import inspect
import math
import signal
import time
from pathlib import Path

import torch

import losses
from data import DATASETS, batches, load
from eval import measure, predict
from models import check_size, create_model
from support import console, distributed, recipes, runs
from support.checkpoints import check_teacher, is_finite, known_top1, load_model, weights_digest
from support.compiled import compiled
from support.cuda_graph import Recorded
from support.devices import amp_by_default, keep_on, layout, mixed_precision, pick_device
from support.distributed import over_processes, process
from support.errors import as_user_error
from support.networks import TORCHVISION
from support.report import cost, training_time
from support.settings import DEVICES, check_run, check_values, make_parser, setting
from support.tables import is_finished, read_run
from swap import misclassified


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every setting of an experiment. None means: use RECIPES, or else the default of the loss
    function. support/settings.py has the bounds, and the groups of --help."""
    method: str = setting("the objective, a function of losses.py", tuple(losses.OBJECTIVES))
    dataset: str = setting("default glyphs, rendered here, no download", tuple(DATASETS))
    student: str = setting("a network of models.py or a classifier of torchvision.models")
    teacher: str = setting("likewise")
    epochs: int = setting("passes over the training images")
    lr: float = setting("learning rate: the highest of the schedule")
    batch_size: int = setting("images a step; under torchrun those of all processes")
    seed: int = setting("of initial weights, order and views")
    views: str = setting("weak: crop and flip; both: also a strong view", ("weak", "both"))
    temperatures: tuple = setting("T of the KL, one or more", metavar="T")
    gamma: int = setting("the student swap starts after this epoch")
    ce_weight: float = setting("a, the weight of the cross-entropy")
    kd_weight: float = setting("b, the weight of the KL terms")
    teacher_fix: str = setting("what is done to the teacher's logits", tuple(losses.TEACHER_FIXES))
    omega: float = setting("added to the label's logit by --teacher-fix add and add-wrong")
    student_swap: bool = setting("the swapped student teaches too")
    detach: bool = setting("stop the gradient through the pseudo-teacher")
    standardize: bool = setting("standardize logits before the temperature")
    alpha: float = setting("dkd, rld: weight of the label's part")
    beta: float = setting("dkd, rld: weight of the other classes' part")
    temperature: float = setting("dkd, rld: T")
    alpha_temperature: float = setting("rld: T of the label's part")
    kd_warmup: float = setting("dkd, rld: epochs until they count in full")
    teacher_checkpoint: str = setting("else a teacher is trained first, and kept", metavar="FILE")
    pretrained: bool = setting("start from torchvision's ImageNet weights")
    data_dir: str = setting("where the data is, or is cached; default data", metavar="DIR")
    image_size: int = setting("side in pixels, of photographs only", metavar="PX")
    evaluate: str = setting("on test, or on val/, or else a tenth of train", ("test", "val"))
    optimizer: str = setting("sgd has momentum 0.9", ("sgd", "adamw"))
    weight_decay: float = setting("on all parameters")
    schedule: str = setting("step: x0.1 at the recipe's drops; cosine: to 0", ("step", "cosine"))
    warmup: float = setting("epochs in which the learning rate grows from 0")
    device: str = setting("default auto: cuda, mps or cpu", DEVICES)
    amp: bool = setting("mixed precision, by default on a GPU: bfloat16, on older ones float16")
    cuda_graph: bool = setting("record each epoch's step as one CUDA graph, faster on a GPU")
    compile: bool = setting("torch.compile student and teacher, for long runs; first step is late")


# What a setting is unless it is given: a row for each data set and optimiser, and for pretrained
# networks on a folder. A dict has a value for each method. warmup, drops (x0.1 by "step"), gamma
# and kd_warmup are written for a run of `of` epochs, and rescaled to --epochs. teach: settings that
# replace these where the teacher itself is trained; its own optimiser chooses the row. mlkd has
# sld's values, untuned, since it too sums several temperatures on two views.
RECIPES = {
    # The other rates for glyphs are the best of grids on its validation part: results/tuning.
    ("glyphs", "sgd"): dict(
        teacher="resnet14", student="resnet8", epochs=9, batch_size=64, weight_decay=5e-4,
        lr=dict(ce=0.4, kd=0.4, sld=0.1, dkd=0.05, rld=0.1, mlkd=0.1), schedule="cosine", warmup=24,
        drops=(150, 180, 210), gamma=150, kd_warmup=20, of=240, teach=dict(epochs=12, lr=0.2)),
    ("glyphs", "adamw"): dict(
        teacher="resnet14", student="resnet8", epochs=16, batch_size=64, weight_decay=0.05,
        lr=dict(ce=2e-3, kd=1e-3, sld=2e-3, dkd=2e-3, rld=2e-3, mlkd=2e-3), schedule="cosine",
        warmup=24, drops=(150, 180, 210), gamma=150, kd_warmup=20, of=240,
        teach=dict(epochs=64, lr=1e-3, views="both")),
    # As published: ce and kd by RepDistiller, the others by their authors.
    ("cifar100", "sgd"): dict(
        teacher="resnet56", student="resnet20", epochs=240, batch_size=64, weight_decay=5e-4,
        lr=dict(ce=0.05, kd=0.05, sld=0.025, dkd=0.05, rld=0.05, mlkd=0.025), schedule="step",
        warmup=0, drops=(150, 180, 210), gamma=150, kd_warmup=20, of=240),
    ("cifar100", "adamw"): dict(
        teacher="resnet56", student="resnet20", epochs=240, batch_size=64, drops=(150, 180, 210),
        lr=1e-3, schedule="cosine", warmup=24, weight_decay=0.05, gamma=150, kd_warmup=20, of=240),
    ("imagenet", "sgd"): dict(
        teacher="resnet34", student="resnet18", epochs=100, of=100, batch_size=512, schedule="step",
        weight_decay=1e-4, lr=0.2, warmup=0, drops=(30, 60, 90), gamma=62.5, kd_warmup=100 / 12,
        ce_weight=dict(kd=0.5, sld=0.5, mlkd=0.5), kd_weight=dict(kd=0.5, sld=0.5, mlkd=0.5)),
    ("imagenet", "adamw"): dict(
        teacher="resnet34", student="resnet18", epochs=100, batch_size=512, weight_decay=0.05,
        lr=1e-3, schedule="cosine", warmup=10, drops=(30, 60, 90), gamma=62.5, kd_warmup=100 / 12,
        of=100, ce_weight=dict(kd=0.5, sld=0.5, mlkd=0.5),
        kd_weight=dict(kd=0.5, sld=0.5, mlkd=0.5)),
    ("folder", "sgd"): dict(
        teacher="resnet20", student="resnet8", epochs=60, batch_size=64, weight_decay=5e-4,
        lr=dict(ce=0.05, kd=0.05, sld=0.025, dkd=0.05, rld=0.05, mlkd=0.025), schedule="step",
        warmup=0, drops=(150, 180, 210), gamma=150, kd_warmup=20, of=240),
    ("folder", "adamw"): dict(
        teacher="resnet20", student="resnet8", epochs=60, batch_size=64, lr=1e-3, schedule="cosine",
        warmup=24, weight_decay=0.05, drops=(150, 180, 210), gamma=150, kd_warmup=20, of=240),
    # AdamW's rate is the best of each method's grid, on real photographs; SGD's are not tuned.
    ("pretrained", "adamw"): dict(
        teacher="resnet50", student="mobilenet_v3_small", epochs=10, batch_size=64, lr=3e-4,
        schedule="cosine", warmup=24, weight_decay=0.05, drops=(150, 180, 210), gamma=150,
        kd_warmup=20, of=240),
    ("pretrained", "sgd"): dict(
        teacher="resnet50", student="mobilenet_v3_small", epochs=10, batch_size=64,
        lr=dict(ce=1e-3, kd=1e-3, sld=1e-4, dkd=1e-4, rld=1e-4, mlkd=1e-4), weight_decay=1e-4,
        schedule="cosine", warmup=24, drops=(150, 180, 210), gamma=150, kd_warmup=20, of=240),
}
RECIPES |= {(name, kind): RECIPES[like, kind] for kind in ("sgd", "adamw")
            for name, like in (("cifar10", "cifar100"), ("glyphs-noisy", "glyphs"))}
# Teachers that are in this repository, for the part that is measured: a validation part is taken
# from the images on which this one was trained. The config.json beside it says how it was made.
TEACHERS = {("glyphs", "resnet14", "test"): "results/teachers/resnet14/seed1000/best.pt"}


def learning_rate(s, done):
    """The rate when `done` epochs are done, fractions within an epoch. s: resolved Settings."""
    if done < s.warmup:
        return s.lr * done / s.warmup
    if s.schedule == "cosine":
        return s.lr * 0.5 * (1 + math.cos(math.pi * (done - s.warmup) / (s.epochs - s.warmup)))
    return s.lr * 0.1 ** sum(done >= drop for drop in recipes.drops(s, RECIPES))


# --- The step -------------------------------------------------------------------------------------
# (S6)  L = sum over the views of  a CE + b ( L_TS + 1[epoch > gamma] L_SS )

def take_step(learner, objective, epoch, views, target, rows, share):
    """Forward, loss and backward of one batch. train_epoch, below, then runs the optimiser.

    views: the weak one, or weak and strong, (B, 3, S, S) each; target: (B,). objective: of one
    view, f(student_logits, teacher_logits, target, epoch) -> {name: term}. rows = B and share = 1,
    but under torchrun `rows` of this process are no padding, and share makes DDP's average right.
    Returns {name: 0-d tensor}: the loss, and sums over the rows of its terms and of the images that
    student and teacher get wrong. Nothing in here makes a GPU wait."""
    # The student takes the views one by one, weak first, each with its own batch statistics. The
    # teacher, frozen, takes both at once: in eval mode no row touches another.
    z_t = [None] * len(views)
    with learner.autocast:
        z_s = [learner.parallel(view).float() for view in views]                   # (B, C) each
        if learner.teacher:
            z_t = learner.teacher(torch.cat(views)).float().split(len(target))     # (B, C) each
    # Outside autocast, so the loss is computed in float32.
    terms = {}
    for student_logits, teacher_logits in zip(z_s, z_t):
        for name, term in objective(student_logits, teacher_logits, target, epoch).items():
            terms[name] = terms.get(name, 0) + term
    loss = sum(terms.values())
    learner.optimizer.zero_grad()
    learner.scaler.scale(loss * share).backward()

    numbers = {"loss": loss.detach()} | {f"loss_{k}": v.detach() * rows for k, v in terms.items()}
    for who, logits in (("student", z_s), ("teacher", z_t)):
        for view, z in zip(("weak", "strong"), logits):
            if z is not None:
                wrong = misclassified(z.detach(), target)[:rows]
                numbers[f"swap_{who}_{view}"] = wrong.sum().float()
    return numbers


def make_objective(s):
    """f(student_logits, teacher_logits, target, epoch) -> {name: term} of one view."""
    if s.method == "ce":
        return lambda z_s, z_t, y, epoch: losses.ce(z_s, y)
    function, options = losses.OBJECTIVES[s.method], recipes.options(s)
    if "epoch" not in inspect.signature(function).parameters:
        return lambda z_s, z_t, y, epoch: function(z_s, z_t, y, **options)
    return lambda z_s, z_t, y, epoch: function(z_s, z_t, y, epoch=epoch, **options)


# Two views where the method was published with them.
VIEWS = dict(ce="weak", kd="weak", sld="both", dkd="weak", rld="weak", mlkd="both")
# resolve(settings) -> Settings with every None filled in. Raises UserError for nonsense.
resolve = functools.partial(recipes.resolve, table=RECIPES, views=VIEWS)


# --- An epoch -------------------------------------------------------------------------------------

@dataclasses.dataclass
class Learner:
    """What a run works with. parallel: the student, under torchrun as DistributedDataParallel."""
    student: torch.nn.Module
    parallel: torch.nn.Module
    teacher: torch.nn.Module
    teacher_digest: str
    optimizer: torch.optim.Optimizer
    autocast: torch.autocast
    scaler: torch.amp.GradScaler
    costs: list = None    # the teacher's top-1, and `cost` of teacher and student


def train_epoch(s, epoch, learner, data):
    """One pass over the training part. Returns the epoch's line of metrics.jsonl: {"epoch", "lr",
    "loss", "loss_<term>", "train_top1", "swap_teacher_<view>", "swap_student", …}, means over the
    rows, shares in percent. s: resolved Settings. Raises UserError where the loss is not finite;
    the weights of that epoch are not saved."""
    device = next(learner.student.parameters()).device
    objective, (rank, world) = make_objective(s), process()
    n, start = len(data.train[1]), time.perf_counter()
    steps, waiting, sums, names, moves = math.ceil(n / s.batch_size), [], [], [], []
    # GradScaler leaves a step out by not calling the optimiser.
    hook = learner.optimizer.register_step_post_hook(lambda *_: moves.append(1))
    learner.student.train()
    # For the dropout of some networks, so that a resumed run draws the same.
    torch.manual_seed((1_000_003 * s.seed + epoch) * world + rank)

    def compute(*tensors):
        numbers = take_step(learner, objective, epoch, tensors[:-1], tensors[-1], rows, share)
        names[:] = numbers
        return torch.stack([*numbers.values()])

    step_of = Recorded(compute, learner.student.parameters()) if s.cuda_graph else compute
    # Views for MPS are made on the CPU.
    made_on = device if device.type == "cuda" else torch.device("cpu")
    made = batches(data, s.batch_size, s.views, s.seed, epoch, rank, world, made_on)
    bar = console.progress(made, steps, f"epoch {epoch} of {s.epochs}, step", s.epochs - epoch + 1)
    for step, (views, target) in enumerate(bar):
        views = [v.to(device, memory_format=layout(device)) for v in views]        # (B, 3, S, S)
        target = target.to(device)                                                 # (B,)
        # In the middle of the step, so that a warm-up does not begin with a rate of 0.
        lr = learning_rate(s, epoch - 1 + (step + 0.5) / steps)
        for group in learner.optimizer.param_groups:
            group["lr"] = lr
        # This process holds `rows` of the global batch's `whole` images. DDP averages gradients;
        # the share makes that the average over the global batch, also with unequal shards.
        whole = min(s.batch_size, n - step * s.batch_size)
        rows = len(range(rank, whole, world))
        share = rows * world / whole
        waiting.append(step_of(*views, target))
        learner.scaler.step(learner.optimizer)
        learner.scaler.update()
        if len(waiting) == 64 or step + 1 == steps:
            # Read seldom, since a GPU waits for it.
            for at, row in enumerate(torch.stack(waiting).tolist(), step + 1 - len(waiting)):
                if not math.isfinite(row[0]):
                    lr = learning_rate(s, epoch - 1 + (at + 0.5) / steps)
                    where = f"epoch {epoch}, step {at + 1} of {steps}, lr {lr:g}"
                    raise console.not_finite(s, where, dict(zip(names, row)))
                sums = [a + b for a, b in zip(sums or [0] * len(row), row)]
            waiting.clear()
    hook.remove()
    sums, seconds = dict(zip(names, over_processes(sums, device))), time.perf_counter() - start
    return runs.as_row(epoch, lr, sums, n, seconds, steps - len(moves), learner.scaler)


# --- A run ----------------------------------------------------------------------------------------

def run(settings, run_dir=None, resume=False, wrap_teacher=None):
    """Train as the Settings say. Returns the history: one dict an epoch, as in metrics.jsonl.

    run_dir: a new folder; default runs/<data>-<method>-<student>/seed<seed>. resume: go on from
    run_dir/last.pt, with that run's own settings. wrap_teacher: f(teacher, digest, s) -> a module
    to use instead of the teacher, for example a cache. Raises UserError for what the user can mend.
    """
    saved, (rank, world) = None, process()
    if resume:
        s, saved = runs.reopen(check_values(settings), run_dir, lambda s: resolve(Settings(**s)))
    else:
        s = resolve(settings)
    device = pick_device(s.device if world == 1 else distributed.device_of_group())
    s = dataclasses.replace(s, amp=amp_by_default(device) if s.amp is None else s.amp)
    with runs.opened(s, run_dir, resume) as folder:
        data = load(s.dataset, s.data_dir, s.image_size, evaluate=s.evaluate)
        if device.type == "cuda":
            keep_on(device, data)
        check_run(s, len(data.train[1]), device, world, check_size)
        learner = begin(s, data, device, saved, wrap_teacher)
        history = runs.restore(saved, s, data, learner) if saved else []
        console.introduce(s, data, learner, folder, *recipes.about(s, RECIPES))
        with runs.report_failure(s, folder, history):
            if rank == 0:
                runs.start(folder, s, data, learner)
            for epoch in range(len(history) + 1, s.epochs + 1):
                row = train_epoch(s, epoch, learner, data)
                if not is_finite(learner.student):
                    raise console.not_finite(s, f"epoch {epoch}")
                if rank == 0:
                    logits = predict(learner.student, data.test[0], data.mean, data.std)
                    measured = measure(logits, data.test[1])
                    row |= {f"{s.evaluate}_{k}": measured[k] for k in ("top1", "top5", "nll")}
                    row["best_top1"] = max([r["best_top1"] for r in history] + [measured["top1"]])
                    runs.save(folder, s, data, learner, history + [row])
                # Only now, since `report_failure` counts what is saved.
                history.append(row)
                if rank == 0:
                    runs.write_metrics(folder, history)
                    console.print_epoch(s, data, history)
            if rank == 0:
                # Here too: a run that was killed after its last checkpoint lacks a line.
                runs.write_metrics(folder, history)
                runs.write_curves(folder)
                console.conclude(s, data, learner, folder, history[-1])
    return history


def begin(s, data, device, saved, wrap_teacher):
    """The Learner of a run whose student is new, or is restored later from `saved`."""
    torch.manual_seed(s.seed)
    C, pretrained = len(data.classes), s.pretrained and s.student in TORCHVISION and not saved
    with as_user_error("--student " if s.teacher else ""):
        student = create_model(s.student, C, s.image_size, pretrained)
    if pretrained:
        console.say_pretrained(s, C)
    teacher, digest = get_teacher(s, data, device) if s.teacher else (None, None)
    student.to(device, memory_format=layout(device))
    costs = teacher and [teacher.top1, *(cost(net, s.image_size) for net in (teacher, student))]
    if teacher and wrap_teacher:
        teacher = wrap_teacher(teacher, digest, s)
    learner = Learner(student, distributed.in_parallel(student), teacher, digest,
                      make_optimizer(s, student), *mixed_precision(device, s.amp), costs)
    return compiled(learner) if s.compile else learner


def make_optimizer(s, student):
    kind = torch.optim.AdamW if s.optimizer == "adamw" else torch.optim.SGD
    more = dict(momentum=0.9) if s.optimizer == "sgd" else {}
    return kind(student.parameters(), lr=s.lr, weight_decay=s.weight_decay, **more)


# --- The teacher ----------------------------------------------------------------------------------

def get_teacher(s, data, device):
    """(the frozen teacher in eval mode, digest of its weights): of --teacher-checkpoint, or of
    TEACHERS, or on imagenet as torchvision publishes it, or else one that is trained first, and
    kept. Raises UserError where it is hardly better than chance, or its logits are not finite."""
    kept = TEACHERS.get((s.dataset, s.teacher, s.evaluate))
    if s.teacher_checkpoint:
        path = origin = s.teacher_checkpoint
    elif kept:
        path, origin = Path(__file__).parent / kept, kept
    elif s.dataset == "imagenet" and s.teacher in TORCHVISION:
        path, origin = s.teacher, "torchvision"
    else:
        path = origin = own_teacher(s, data, device)
    teacher, saved = load_model(path, s.teacher, data)
    teacher.requires_grad_(False).to(device, memory_format=layout(device))
    top1 = known_top1(saved, s, data)
    if top1 is None:
        logits = predict(teacher, data.test[0], data.mean, data.std, who=origin)
        top1 = measure(logits, data.test[1])["top1"]
    check_teacher(s, origin, top1, len(data.classes))
    print(f"teacher   {s.teacher} from {origin}: {top1:.2f} % {s.evaluate} top-1")
    teacher.top1 = top1
    return teacher, weights_digest(teacher)


def own_teacher(s, data, device):
    """The last.pt of this data's own teacher, which is trained first, or finished. Without `teach`
    in its recipe it trains as many epochs as the student."""
    mine = recipes.of_teacher(s, RECIPES, len(data.train[1]))
    folder = runs.teacher_folder(s, data, mine)
    started = (folder / "config.json").exists()
    if (folder / "metrics.jsonl").exists() and is_finished(*read_run(folder)):
        return folder / "last.pt"
    if started:
        mine, how_long = dict(data_dir=s.data_dir, device=s.device), ""
    else:
        how_long = f", which takes about {training_time(mine, data, device)} min"
    print(f"no {s.teacher} teacher for this data yet: {'going on with' if started else 'training'} "
          f"it first, in {folder}{how_long}\n(your own instead: --teacher-checkpoint FILE)\n")
    try:
        run(Settings(**mine), folder, resume=started)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on with the teacher")
    print()
    return folder / "last.pt"


def main(wrap_teacher=None):
    parser = make_parser(Settings, __doc__)
    # SIGTERM, with which clusters end a job, is then like Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with console.one_line_errors(parser):
        given = vars(parser.parse_args())
        run_dir, resume = given.pop("run_dir"), given.pop("resume")
        with distributed.several_processes(given["device"] or runs.saved_device(run_dir)):
            run(Settings(**given), run_dir, resume, wrap_teacher)


if __name__ == "__main__":
    main()
