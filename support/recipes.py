"""How a table of recipes, train.RECIPES, becomes the settings of one experiment."""
import dataclasses
import inspect
from pathlib import Path

import losses
from data import DATASETS
from models import check_name, check_size
from support import photographs, tables
from support.errors import UserError, as_user_error, nearest
from support.networks import TORCHVISION
from support.settings import check_sense, check_values, flag

# Families of networks that train with AdamW.
TRANSFORMERS = ("vit", "swin", "maxvit", "convnext")


def is_fine_tuned(dataset, network, pretrained):
    """Whether a network starts from ImageNet's weights and learns photographs."""
    return dataset == "folder" and bool(pretrained) and network in TORCHVISION


def optimizer_of(dataset, network, pretrained):
    """AdamW for transformers, and for whatever is fine-tuned: on photographs of rubbish it did
    better than SGD with mobilenet_v2, and as well with squeezenet1_0 (results/photographs)."""
    tuned = is_fine_tuned(dataset, network, pretrained)
    return "adamw" if tuned or network.startswith(TRANSFORMERS) else "sgd"


def row_of(s, table):
    """The row of the table that resolved settings s were filled in from."""
    return table[_key(s.dataset, s.optimizer, s.student, s.pretrained)]


def _key(dataset, optimizer, student, pretrained):
    tuned = is_fine_tuned(dataset, student, pretrained)
    return "pretrained" if tuned else dataset, optimizer


def of_teacher(s, table, n):
    """{setting: value} with which the teacher of the settings s is trained, on n images. Its seed
    is not a student's: views follow from the seed, and on the very views of its own training a
    teacher errs less than on others."""
    pretrained = s.pretrained if s.teacher in TORCHVISION else None
    optimizer = optimizer_of(s.dataset, s.teacher, pretrained)
    row = table[_key(s.dataset, optimizer, s.teacher, pretrained)]
    # Photographs may be so few that more and smaller steps are needed, for both networks.
    tuned = is_fine_tuned(s.dataset, s.teacher, pretrained)
    return dict(
        method="ce", dataset=s.dataset, data_dir=s.data_dir, image_size=s.image_size,
        student=s.teacher, pretrained=pretrained,
        seed=1000, evaluate=s.evaluate, amp=s.amp, device=s.device, epochs=s.epochs,
        batch_size=min(s.batch_size if tuned else row["batch_size"], n)) | row.get("teach", {})


def drops(s, table):
    """The epochs after which the schedule "step" goes down."""
    row = row_of(s, table)
    return sorted({round(m * s.epochs / row["of"]) for m in row["drops"]})


def defaults_of(method):
    """{setting: default} of what an objective of losses.py can be told: its keywords."""
    keywords = [p for p in inspect.signature(losses.OBJECTIVES[method]).parameters.values()
                if p.kind is p.KEYWORD_ONLY and p.name != "epoch"]
    # Settings.warmup is the learning rate's.
    return {"kd_warmup" if p.name == "warmup" else p.name: p.default for p in keywords}


def options(s):
    """{keyword: value} for the objective of resolved settings s."""
    return {"warmup" if name == "kd_warmup" else name: getattr(s, name)
            for name in defaults_of(s.method)}


def resolve(s, table, views):
    """The Settings s with every None filled in: from the row of the table, from the defaults of the
    objective, and views from {method: views}. What is given always stays. Raises UserError for
    nonsense."""
    given = check_values(s)
    method, dataset = given.get("method", "sld"), given.get("dataset", "glyphs")
    refuse_foreign(given, method)
    if ("dataset" not in given and "data_dir" in given
            and photographs.looks_like_one(Path(given["data_dir"]))):
        raise UserError(f"--data-dir {given['data_dir']}: holds folders of images; give --dataset "
                        "folder with it")
    roles = ("student",) if method == "ce" else ("student", "teacher")
    # For photographs a network of torchvision has a partner from torchvision.
    theirs = dataset == "folder" and any(given.get(role) in TORCHVISION for role in roles)
    partners = table["pretrained" if theirs else dataset, "sgd"]
    networks = {role: given.get(role, partners[role]) for role in roles}
    for role, name in networks.items():
        with as_user_error(f"{flag(role)} "):
            check_name(name)
    theirs = [name for name in networks.values() if name in TORCHVISION]
    pretrained = given.get("pretrained", dataset == "folder") if theirs else None
    optimizer = given.get("optimizer", optimizer_of(dataset, networks["student"], pretrained))
    key = _key(dataset, optimizer, networks["student"], pretrained)
    if key not in table:
        raise UserError(f"--optimizer {optimizer}: train.RECIPES has no row {key}; add one, or "
                        "give another --optimizer")
    row = table[key]
    own = defaults_of(method)
    check_options(method, own, s)
    full = dict.fromkeys(field.name for field in dataclasses.fields(s))
    full |= dict(method=method, dataset=dataset, data_dir="data", evaluate="test", seed=0,
                 device="auto", optimizer=optimizer, views=views.get(method, "weak"),
                 image_size=224 if theirs and dataset == "folder" else DATASETS[dataset].side) | own
    for name in full.keys() & row.keys():
        value = row[name]
        if isinstance(value, dict):
            # A method with no rate in this row uses kd's.
            value = value.get(method, value["kd"] if name == "lr" else full[name])
        if name not in ("gamma", "kd_warmup") or name in own:
            full[name] = value
    full |= networks | given | dict(pretrained=pretrained)
    epochs = full["epochs"]
    if "warmup" not in given:
        full["warmup"] = row["warmup"] * epochs / row["of"]
    if not full["student_swap"]:
        full["gamma"] = None
    elif "gamma" not in given:
        full["gamma"] = min(round(row["gamma"] * epochs / row["of"]), epochs - 1)
    if full["kd_warmup"] is not None and "kd_warmup" not in given:
        full["kd_warmup"] = row["kd_warmup"] * (epochs / row["of"])
    if method == "ce":
        full["teacher"] = None
    if full["temperatures"] is not None:
        full["temperatures"] = tuple(full["temperatures"])
    s = type(s)(**full)
    check_sense(s, given, pretrainable=bool(theirs))
    for name in networks.values():
        with as_user_error(f"--image-size {s.image_size}: "):
            check_size(name, s.image_size)
    return s


def about(s, table):
    """(the `drops`, the objective with the numbers that it takes and, where its learning rate is
    not its own, a line that says so)."""
    numbers = ", ".join(f"{name} {tables.in_words(value)}" for name, value in options(s).items())
    rates, borrowed = row_of(s, table)["lr"], ""
    rates = rates if isinstance(rates, dict) else dict(kd=rates)
    if s.method not in rates and s.lr == rates["kd"]:
        borrowed = (f"\n          at kd's learning rate, which is not tuned for {s.method} on this "
                    "data: compare several (--lr)")
    return drops(s, table), f"losses.{s.method}{numbers and ': '}{numbers}{borrowed}"


def check_options(method, own, s):
    """Raises UserError where an option of the objective has no field in the Settings s, or no
    default: own is {option: default}."""
    for name, default in own.items():
        if not hasattr(s, name):
            raise UserError(f"--method {method}: the objective takes {name}, which is no field of "
                            f"train.Settings; add it there, beside kd_weight")
        if default is inspect.Parameter.empty:
            raise UserError(f"--method {method}: {name} has no default in losses.py; give it one")


def refuse_foreign(given, method):
    """Raises UserError where a flag belongs to another method than this one."""
    def known(name):
        return {*defaults_of(name)} | ({"teacher", "teacher_checkpoint"} if name != "ce" else set())
    every = {name for other in losses.OBJECTIVES for name in known(other)}
    foreign = [flag(k) for k in given if k in every - known(method)]
    if foreign:
        near = nearest(foreign[0], map(flag, defaults_of(method)))
        raise UserError(f"{', '.join(foreign)}: no part of --method {method}; "
                        f"{near or 'leave it out'}, or choose another method")
