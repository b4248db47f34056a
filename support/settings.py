"""The settings of an experiment as flags: their groups and bounds, and what excludes what."""
import argparse
import dataclasses
from pathlib import Path

from support.errors import UserError, as_user_error

# --help shows the flags in these groups, which hold every field of train.Settings.
GROUPS = {
    "what is minimised": "method views temperatures gamma ce_weight kd_weight teacher_fix omega "
                         "student_swap detach standardize alpha beta temperature "
                         "alpha_temperature kd_warmup",
    "networks": "student teacher teacher_checkpoint pretrained",
    "data": "dataset data_dir image_size evaluate",
    "optimisation": "epochs batch_size optimizer lr weight_decay schedule warmup",
    "the run": "seed device amp cuda_graph compile",
}
EXAMPLES = """
examples:
  python train.py --method sld
  python train.py --method kd --views both --temperatures 1 2 3 4 5 6 --lr 0.1

The numbers that are not given stand in RECIPES, in train.py, and those of an objective are the
defaults of its function in losses.py."""
# Outside these, a value overflows or has no effect.
COUNT = "from 1 to a billion", lambda v: 1 <= v <= 10 ** 9
POSITIVE = "above 0, at most a million", lambda v: 0 < v <= 10 ** 6
NOT_NEGATIVE = "from 0 to a million", lambda v: 0 <= v <= 10 ** 6
TEMPERATURE = "from 0.01 to 10000", lambda v: 0.01 <= v <= 10 ** 4
BOUNDS = {
    **dict.fromkeys(("image_size", "epochs", "batch_size"), COUNT),
    **dict.fromkeys(("lr", "kd_warmup"), POSITIVE),
    **dict.fromkeys(("gamma", "ce_weight", "kd_weight", "alpha", "beta", "warmup"), NOT_NEGATIVE),
    **dict.fromkeys(("temperatures", "temperature", "alpha_temperature"), TEMPERATURE),
    "omega": ("from -10000 to 10000", lambda v: abs(v) <= 10 ** 4),
    "weight_decay": ("from 0 to 1", lambda v: 0 <= v <= 1),
    "seed": ("from 0 to 2^32 - 1", lambda v: 0 <= v < 2 ** 32),
}


def setting(help, choices=None, metavar=None):
    """A field of Settings that the recipe fills unless it is given. help, choices, metavar: as
    argparse takes them."""
    return dataclasses.field(default=None, metadata=dict(help=help, choices=choices,
                                                         metavar=metavar))


def flag(name):
    return "--" + name.replace("_", "-")


def make_parser(settings_class, description):
    """The command line with a flag for each field of `settings_class`."""
    parser = argparse.ArgumentParser(prog="train.py", usage="python train.py [flag ...]",
                                     description=description + EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}; see --help\n")
    fields = {field.name: field for field in dataclasses.fields(settings_class)}
    grouped = {title: names.split() for title, names in GROUPS.items()}
    # A field that somebody added belongs to an objective.
    grouped["what is minimised"] += fields.keys() - {name for g in grouped.values() for name in g}
    for title, names in grouped.items():
        group = parser.add_argument_group(title)
        for field in (fields[name] for name in names):
            options = {k: v for k, v in field.metadata.items() if v is not None}
            if field.type is bool:
                options["action"] = argparse.BooleanOptionalAction
            elif field.type is tuple:
                options |= dict(type=float, nargs="+")
            else:
                options["type"] = field.type
            group.add_argument(flag(field.name), **options)
    group.add_argument("--run-dir", metavar="DIR", help="a new folder for logs and checkpoints; "
                       "default: runs/<data>-<method>-<student>/seed<seed>")
    group.add_argument("--resume", action="store_true", help="go on with the run in --run-dir, by "
                       "its own settings; only --data-dir, --device, --cuda-graph and --compile go "
                       "with it")
    return parser


def check_values(s):
    """{name: value} of what is not None. Raises UserError for a wrong type, word or range."""
    given = {k: str(v) if isinstance(v, Path) else v for k, v in vars(s).items() if v is not None}
    for field in dataclasses.fields(s):
        if field.name not in given:
            continue
        value, several = given[field.name], field.type is tuple
        kind = float if several else field.type
        words, fits = BOUNDS.get(field.name, ("", lambda v: True))
        choices = field.metadata.get("choices")
        if several and not isinstance(value, (tuple, list)):
            raise UserError(f"{flag(field.name)} {value!r}: must be a list")
        if several and not value:
            raise UserError(f"{flag(field.name)}: give at least one")
        for one in value if several else [value]:
            right = isinstance(one, (int, float) if kind is float else kind)
            if not right or isinstance(one, bool) != (kind is bool):
                raise UserError(f"{flag(field.name)} {one!r}: must be of type {kind.__name__}")
            if choices and one not in choices:
                raise UserError(f"{flag(field.name)} {one}: unknown; choose among "
                                f"{', '.join(choices)}")
            if not fits(one):
                raise UserError(f"{flag(field.name)} {one}: must be {words}")
    return given


def check_sense(s, given, pretrainable):
    """Raises UserError where resolved settings contradict each other, or a flag has no effect.

    given: what the user said. pretrainable: whether one of the networks has published weights.
    """
    for wrong, message in (
        (s.warmup >= s.epochs,
         f"--warmup {s.warmup:g}: must be shorter than the {s.epochs} epochs"),
        (not pretrainable and "pretrained" in given,
         f"--pretrained: there are no weights for {', '.join(filter(None, (s.student, s.teacher)))}"
         "; leave it out, or choose networks of torchvision.models"),
        (not s.student_swap and ("gamma" in given or given.get("detach")),
         "--gamma, --detach: part of the student swap; leave out --no-student-swap or them"),
        (s.student_swap and s.gamma >= s.epochs,
         f"--gamma {s.gamma}: the student swap would never start in a run of {s.epochs} epochs; "
         f"give 0 to {s.epochs - 1}, or --no-student-swap"),
        ((s.teacher_fix == "add") != (s.omega is not None),
         "--omega: give it with --teacher-fix add, and only there"),
    ):
        if wrong:
            raise UserError(message)


def check_run(s, n, device, world, check_size):
    """Raises UserError where n training images do not make batches for `world` processes, or there
    can be no CUDA graph. check_size: models.check_size."""
    if s.cuda_graph and (device.type != "cuda" or world > 1):
        raise UserError("--cuda-graph: needs a CUDA device and a single process; leave it out")
    if s.batch_size > n:
        raise UserError(f"--batch-size {s.batch_size}: there are only {n} training images")
    if s.batch_size < world:
        raise UserError(f"--batch-size {s.batch_size}: less than one image for each of {world} "
                        "processes; give a larger one, or fewer processes")
    if (n % s.batch_size or s.batch_size) // world <= 1:
        # Batch norm may have nothing to average over.
        with as_user_error(f"--batch-size {s.batch_size}: leaves one image for the last step: "):
            check_size(s.student, s.image_size, images=1)
