"""The settings of an experiment as flags: their groups and bounds, and what excludes what."""
import argparse
import dataclasses
from pathlib import Path

from data import DATASETS
from models import check_name
from support.errors import UserError, as_user_error, nearest

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
DEVICES = ("auto", "cpu", "cuda", "mps")
# The lowest and the highest value. Outside these, one overflows or has no effect.
BOUNDS = {
    **dict.fromkeys(("image_size", "epochs", "batch_size"), (1, 10 ** 9)),
    **dict.fromkeys(("lr", "kd_warmup"), (1e-30, 10 ** 6)),
    **dict.fromkeys(("gamma", "ce_weight", "kd_weight", "alpha", "beta", "warmup"), (0, 10 ** 6)),
    **dict.fromkeys(("temperatures", "temperature", "alpha_temperature"), (0.01, 10 ** 4)),
    "omega": (-10 ** 4, 10 ** 4), "weight_decay": (0, 1), "seed": (0, 2 ** 32 - 1),
}


def setting(help, choices=None, metavar=None):
    """A field of Settings that the recipe fills unless it is given. help, choices, metavar: as
    argparse takes them."""
    return dataclasses.field(default=None, metadata=dict(
        help=help, choices=choices, metavar=metavar or choices and f"{{{','.join(choices)}}}"))


def flag(name):
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are one line with the nearest flag. flag_of: {word: the flag to which
    it belongs}, for a word that stands alone."""

    def __init__(self, prog, usage, description, flag_of=()):
        super().__init__(prog, usage, description,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        self.flag_of = dict(flag_of)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see --help\n")

    def parse_args(self, args=None):
        args, rest = self.parse_known_args(args)
        if rest:
            word = rest[0].split("=")[0]
            if word.lower() in self.flag_of:
                self.error(f"{word}: say {self.flag_of[word.lower()]} {word.lower()}")
            if Path(word).is_dir():
                self.error(f"{word}: say --run-dir {word}")
            near = nearest(word, map(flag, vars(args)) if word.startswith("-") else self.flag_of)
            self.error(f"{word}: unknown{near and '; '}{near}")
        return args


def number(text):
    """The float that a flag takes."""
    if "," in text:
        raise argparse.ArgumentTypeError(f"{text}: write decimals with a point, and put spaces "
                                         "between several numbers")
    return float(text)


def make_parser(settings_class, description):
    """The command line with a flag for each field of `settings_class`."""
    fields = {field.name: field for field in dataclasses.fields(settings_class)}
    parser = Parser("train.py", "python train.py [flag ...]", description + EXAMPLES,
                    {word: flag(name) for name, field in fields.items()
                     for word in field.metadata["choices"] or ()})
    grouped = {title: names.split() for title, names in GROUPS.items()}
    # A field that somebody added belongs to an objective.
    grouped["what is minimised"] += fields.keys() - {name for g in grouped.values() for name in g}
    for title, names in grouped.items():
        group = parser.add_argument_group(title)
        for field in (fields[name] for name in names):
            # Which words there are says check_values, to notebooks too.
            options = {k: v for k, v in field.metadata.items() if v is not None and k != "choices"}
            if field.type is bool:
                options["action"] = argparse.BooleanOptionalAction
            elif field.type is tuple:
                options |= dict(type=number, nargs="+")
            else:
                options["type"] = number if field.type is float else field.type
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
        if several and not (isinstance(value, (tuple, list)) and value):
            raise UserError(f"{flag(field.name)} {value!r}: must be a list of at least one number")
        for one in value if several else [value]:
            # The very type, since a bool is also an int.
            if type(one) is not kind and (type(one), kind) != (int, float):
                raise UserError(f"{flag(field.name)} {one!r}: must be of type {kind.__name__}")
            check_word(field.name, one, field.metadata.get("choices") or (one,))
            check_bounds(field.name, one)
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
        ((s.teacher_fix in ("add", "add-wrong")) != (s.omega is not None),
         "--omega: give it with --teacher-fix add or add-wrong, and only there"),
    ):
        if wrong:
            raise UserError(message)


# What eval.py does, and the other flags that have an effect then.
MODES = {"table": "against", "plot": "output", "predict": "checkpoint device json",
         "export": "checkpoint model dataset image_size", "checkpoint":
         "model dataset data_dir image_size teacher_checkpoint teacher device json"}


def mode_of(args):
    """Which of MODES is asked of eval.py. Raises UserError for flags that do not belong together,
    and for unknown words."""
    modes = [mode for mode in ("table", "plot", "checkpoint") if getattr(args, mode)]
    if len(modes) != 1:
        raise UserError("give a CHECKPOINT, also for --predict and --export, or --table DIR, or "
                        "--plot RUN")
    mode = next((mode for mode in ("predict", "export") if getattr(args, mode)), modes[0])
    for name, value in vars(args).items():
        if value not in (None, False) and name not in (mode, *MODES[mode].split()):
            raise UserError(f"{flag(name)}: has no effect with "
                            f"{'a ' if mode == 'checkpoint' else '--'}{mode}; leave it out")
    if args.teacher and not args.teacher_checkpoint:
        raise UserError("--teacher: names the network of --teacher-checkpoint; give both")
    if args.image_size is not None:
        check_bounds("image_size", args.image_size)
    for name, choices in (("dataset", DATASETS), ("device", DEVICES)):
        check_word(name, getattr(args, name), choices)
    for name in ("model", "teacher"):
        if getattr(args, name) is not None:
            with as_user_error(f"{flag(name)} "):
                check_name(getattr(args, name))
    return mode


def check_bounds(name, number):
    """Raises UserError where the flag `name` has a number that is not within its BOUNDS."""
    if name in BOUNDS and not BOUNDS[name][0] <= number <= BOUNDS[name][1]:
        low, high = BOUNDS[name]
        raise UserError(f"{flag(name)} {number}: must be from {low} to {high}")


def check_word(name, word, choices):
    """Raises UserError where the flag `name` has a word that is none of its choices."""
    if word is not None and word not in choices:
        near = nearest(word, choices)
        raise UserError(f"{flag(name)} {word}: unknown; {near}{near and '; '}choose among "
                        f"{', '.join(choices)}")


def check_run(s, n, device, world, check_size):
    """Raises UserError where n training images do not make batches for `world` processes, or the
    method or a CUDA graph does not go with them. check_size: models.check_size."""
    if s.method == "mlkd" and world > 1:
        raise UserError("--method mlkd: compares the images of a batch with each other, so one "
                        "process has to see them all; start it without torchrun")
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
