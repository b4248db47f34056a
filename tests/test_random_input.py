"""Flags, config values, folders and damaged files drawn at random: a script ends with status 0, or
with 2 and one line, never with a traceback, and changes no file outside its run folder.

By hand, with the summary that is kept in results/checks/reliability/draws.txt:
    python -m pytest -m slow -n 0 tests/test_random_input.py --draws 5000 -s
"""
import collections
import json
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
import train

NUMBERS = ["0", "-1", "1", "2", "3", "0.5", "1e-9", "1e39", "-1e308", "nan", "inf", "9" * 400, "x",
           "", "1_0", "0x10", "１", "1e", "--", "2 3", "True", "None"]
WORDS = ["", "x", "resnet9", "None", "../..", "a b", "é", "a\nb", "0", "folder", "'", "*"]
# Valid values only where a run with them is short.
VALUES = {
    "method": [*train.losses.OBJECTIVES, *WORDS],
    "dataset": ["folder", "glyphs", "cifar10", *WORDS],
    # Not this session's other folders of images.
    "data-dir": ["photos", "photos/train", "run", "missing", "photos/val/a/0.png",
                 *(word for word in WORDS if word != "../..")],
    "image-size": ["1", "3", "8", "16", "1000000000", *NUMBERS],
    "evaluate": ["test", "val", *WORDS],
    "teacher": ["resnet8", "vit_nano", "squeezenet1_1", *WORDS],
    "teacher-checkpoint": ["teacher.pt", "run/last.pt", "run/best.pt", "photos", "missing", *WORDS],
    "student": ["resnet8", "vit_nano", "squeezenet1_1", "vgg11", "inception_v3", *WORDS],
    "views": ["weak", "both", *WORDS],
    "epochs": ["1", "2", "3", "0", "-1", "9" * 400, "x", "1.5"],
    "batch-size": ["1", "2", "5", "11", "12", "13", *NUMBERS],
    "optimizer": ["sgd", "adamw", *WORDS],
    "schedule": ["step", "cosine", *WORDS], "seed": ["0", "4294967295", "4294967296", *NUMBERS],
    "device": ["cpu", "tpu", *WORDS], "teacher-fix": [*train.losses.TEACHER_FIXES, *WORDS],
    "temperatures": ["1 4", "1 1e39", "4 x", *NUMBERS],
}
SWITCHES = ("amp", "detach", "student-swap", "standardize", "pretrained", "cuda-graph")
FORMS = {"RGB": "png jpg bmp webp gif tif", "L": "png jpg tif", "RGBA": "png webp tif",
         "P": "png gif", "1": "png tif", "I;16": "png tif", "F": "tif", "CMYK": "jpg tif",
         "LA": "png"}


def image_of(luck, g, mode):
    w, h = luck.choice([(1, 1), (1, 40), (9, 7), (16, 16), (300, 3)])
    if mode in ("I;16", "F"):
        numbers = g.integers(0, 60000, (h, w))
        return Image.fromarray(numbers.astype(np.float32 if mode == "F" else np.uint16))
    return Image.fromarray(g.integers(0, 256, (h, w, 3), np.uint8)).convert(mode)


def photos(luck, g, odd):
    """An image folder; an odd one may lack what it needs, or have what nobody expects."""
    shutil.rmtree("photos", ignore_errors=True)
    names = ["a", "b", "c", "D d", "é", ".x", "0"]
    classes = luck.sample(names, luck.choice([0, 1, 2, 3, 3, 3]) if odd else 3)
    for part in ("train", luck.choice(["val", "test"])):
        for name in classes if not odd or luck.random() < 0.9 else classes[1:]:
            folder = Path("photos", part, name)
            folder.mkdir(parents=True)
            for i in range(luck.randrange(4) if odd and luck.random() < 0.1 else 4):
                mode = luck.choice([*FORMS]) if odd and luck.random() < 0.1 else "RGB"
                ending = luck.choice(FORMS[mode].split())
                image_of(luck, g, mode).save(folder / f"{i}.{ending}")
            if odd and luck.random() < 0.05:
                luck.choice(ODD)(folder)


ODD = (lambda folder: (folder / "up").symlink_to(".."),
       lambda folder: (folder / "notes.txt").write_text("x"),
       lambda folder: (folder / "dead.png").symlink_to("nowhere"),
       lambda folder: (folder / "folder.png").mkdir(),
       lambda folder: (folder / "x.png").write_bytes(b""))


def damage(luck, path):
    """Cut off, or one bit flipped, at a random place."""
    content = bytearray(path.read_bytes())
    if luck.random() < 0.5 or not content:
        del content[luck.randrange(len(content) + 1):]
        what = f"cut to {len(content)} bytes"
    else:
        at, bit = luck.randrange(len(content)), luck.randrange(8)
        content[at] ^= 1 << bit
        what = f"bit {bit} of byte {at}"
    path.write_bytes(content)
    return f"{path}: {what}"


def random_json(luck):
    return luck.choice([None, True, False, 0, 1, -1, 2.5, 1e308, 10 ** 400, float("nan"), "", "x",
                        "2", [], [1, 2], ["a"], {}, {"a": 1}, "resnet8", "cpu", "é\n"])


BASE = {"dataset": "folder", "data-dir": "photos", "image-size": "8", "student": "resnet8",
        "device": "cpu", "epochs": "1", "batch-size": "5", "run-dir": "new"}


def draw(luck, g):
    """(what was drawn, script, arguments)."""
    kind = luck.choice(["train flags", "eval flags", "config", "damaged file", "folder"])
    resume = ["--resume", "--run-dir", "run"]
    looks = [(evaluation, ["run/last.pt"]), (evaluation, ["--table", "."]),
             (evaluation, ["--plot", "run"]), (train, resume),
             (evaluation, ["run/best.pt", "--teacher-checkpoint", "run/last.pt", "--json"])]
    if kind == "train flags":
        flags = dict(BASE, method=luck.choice(["ce", "sld", "kd"]))
        if flags["method"] != "ce":
            flags |= {"teacher": "resnet8", "teacher-checkpoint": "teacher.pt"}
        for _ in range(luck.randint(1, 2)):
            name = luck.choice([f.name for f in train.dataclasses.fields(train.Settings)])
            name = name.replace("_", "-")
            if name not in SWITCHES:
                flags[name] = luck.choice(VALUES.get(name, NUMBERS))
        words = [w for k, v in flags.items()
                 for w in (f"--{k}", *(v.split() if k == "temperatures" else [v]))]
        words += [luck.choice(["--", "--no-"]) + s for s in SWITCHES if luck.random() < 0.05]
        return kind, train, words + ([] if luck.random() < 0.95 else ["--resume"])
    if kind == "eval flags":
        values = dict(VALUES, model=VALUES["student"], predict=VALUES["data-dir"],
                      table=VALUES["data-dir"] + ["."], plot=["run", "photos", *WORDS],
                      against=["run", *WORDS], output=["curves.png", "run/curves.png", *WORDS])
        names = luck.sample(["model", "dataset", "data-dir", "image-size", "predict", "teacher",
                             "teacher-checkpoint", "device", "table", "plot", "against",
                             "output"],
                            luck.randrange(4))
        words = [w for name in names for w in (f"--{name}", luck.choice(values[name]))]
        file = luck.choice(["run/last.pt", "run/best.pt", "teacher.pt", "missing.pt", "photos", "",
                            "run/config.json", "resnet18", None])
        return kind, evaluation, [file][:file is not None] + words + ["--json"][:luck.randrange(2)]
    if kind == "config":
        config = json.loads(Path("run/config.json").read_text())
        for _ in range(luck.randint(1, 3)):
            config[luck.choice([*config, "hello"])] = random_json(luck)
        config = config if luck.random() < 0.9 else random_json(luck)
        Path("run/config.json").write_text(json.dumps(config))
        return f"config values: {config}", *luck.choice(looks)
    if kind == "damaged file":
        path = luck.choice([p for p in [*Path("run").iterdir(), *Path("photos").rglob("*.*"),
                                        *Path("data").glob("*.np?")] if p.is_file()])
        fresh = (train, [w for k, v in BASE.items() for w in (f"--{k}", v)] + ["--method", "ce"])
        return f"damaged file: {damage(luck, path)}", *luck.choice([*looks, fresh])
    photos(luck, g, odd=True)
    words = [w for k, v in BASE.items() for w in (f"--{k}", v)]
    words += ["--method", "ce", "--evaluate", luck.choice(["test", "val"])]
    return "odd folder", train, words


def state():
    """{file: (size, time)} of all but what a run, the decoded images and --plot may write."""
    return {str(p): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in Path().rglob("*")
            if p.parts[0] not in ("run", "new", "runs", "data", "curves.png") and not p.is_dir()}


@pytest.mark.slow
def test_whatever_is_drawn_ends_well(command, easy_glyphs, request, monkeypatch, tmp_path):
    draws, counts, slowest = request.config.getoption("--draws"), collections.Counter(), (0, "")
    for optimizer in ("sgd", "adamw"):
        monkeypatch.setitem(train.RECIPES["folder", optimizer], "epochs", 2)
        monkeypatch.setitem(train.RECIPES["pretrained", optimizer], "epochs", 2)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no-weights-here"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: open("/no/network"))
    photos(random.Random(0), np.random.default_rng(0), odd=False)
    flags = BASE | {"run-dir": "kept", "epochs": "2", "method": "ce"}
    assert command(train, *(w for k, v in flags.items() for w in (f"--{k}", v)))[0] == 0
    shutil.copy("kept/last.pt", "teacher.pt")
    # At chance on images of noise; then every run with a teacher would end at once.
    monkeypatch.setattr(train, "known_top1", lambda *a: 90.0)
    shutil.copytree("photos", "photos-kept", symlinks=True)
    shutil.copytree("data", "data-kept", dirs_exist_ok=True)
    for k in range(draws):
        luck = random.Random(k)
        for folder in ("run", "new", "runs", "photos", "data"):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree("kept", "run")
        shutil.copytree("photos-kept", "photos", symlinks=True, copy_function=shutil.copy2)
        shutil.copytree("data-kept", "data")
        what, script, words = draw(luck, np.random.default_rng(k))
        before, start = state(), time.perf_counter()
        about = f"draw {k}: {what}: {script.__name__}.py {words}"
        try:
            status, out, err = command(script, *words)
        except BaseException as error:
            raise AssertionError(about) from error
        took = time.perf_counter() - start
        assert status in (0, 2), (about, status, out, err)
        # Before the one line torch says what it downloads, and eval.py --json what is prepared.
        on_the_way = "Downloading: ", "decoding ", "rendering ", "note "
        err = "".join(x for x in err.splitlines(True) if not x.startswith(on_the_way))
        assert status == 0 or err.count("\n") == 1 and err.startswith(f"{script.__name__}.py: "), (
            about, err)
        assert "Traceback" not in out + err, about
        assert state() == before, about
        counts[" ".join(what.split()[:2]), status] += 1
        slowest = max(slowest, (took, about[:200]))
    # Half of them would be too much to ask, but some of each kind do end well.
    assert draws < 200 or all(counts[kind, 0] for kind, _ in counts)
    for (kind, status), count in sorted(counts.items()):
        print(f"{kind:14s} status {status}: {count}")
    print(f"{draws} draws; the slowest took {slowest[0]:.1f} s: {slowest[1]}")
