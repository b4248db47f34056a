"""The README's commands run, shortened by flags only, and its tables are what the logs give."""
import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path

import benchmark
import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
import train
from models import create_model
from results.pages import narrow
from support import console, glyphs
from support.tables import (
    last_top1,
    markdown,
    mean_and_sd,
    read_rows,
    read_run,
    table,
    top1_difference,
)
from swap import swap

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = "\n".join([README, *(page.read_text("utf-8")
                            for page in sorted((ROOT / "results").rglob("README.md")))])
TEXT = " ".join(PAGES.split())
COMMANDS = [line.split("&&")[-1].strip() for block in re.findall(r"```sh\n(.*?)```", README, re.S)
            for line in block.splitlines()]


def test_the_two_commands_stand_in_the_readme_and_the_gate():
    assert "pip install -r requirements.txt && python train.py --method sld" in README
    assert "pip install -r requirements.txt && python -m pytest" in README
    assert "python -m pytest" in (ROOT / ".ci/run").read_text()
    # Threads that compete for two cores are four times as slow.
    assert "want `OMP_NUM_THREADS=1`" in " ".join(README.split())


def constant_teacher(name, classes, path):
    """Always says class 0, which is most of the test images below: enough to pass the door."""
    model = create_model(name, classes)
    torch.nn.init.zeros_(model.fc.weight)
    with torch.no_grad():
        model.fc.bias[0] = 1
    torch.save(model.state_dict(), path)


@pytest.mark.slow
def test_every_command_runs(easy_glyphs, colors, color_teacher, command, tmp_path):
    shutil.copytree(colors, "photos")
    for name in ("a.jpg", "b.png"):
        shutil.copy(colors / "val/red/0.png", name)
    shutil.copytree(ROOT / "results", "results")
    for k in range(100):
        for part, n in (("train", 1), ("test", 1 + 50 * (k == 0))):
            (tmp_path / f"cifar/{part}/{k:02d}").mkdir(parents=True)
            for i in range(n):
                image = Image.new("RGB", (32, 32), (k, 50, i))
                image.save(tmp_path / f"cifar/{part}/{k:02d}/{i}.png")
    constant_teacher("resnet56", 100, "cifar100_resnet56.pth")
    kept = "results/teachers/resnet14/seed1000/best.pt"
    assert kept in (ROOT / "train.py").read_text("utf-8")
    assert command(train, "--method", "ce", "--data-dir", easy_glyphs, "--student", "resnet14",
                   "--epochs", 3, "--lr", 0.1, "--batch-size", 16, "--run-dir",
                   f"runs/teacher-glyphs-{glyphs.VERSION}-12-epochs-resnet14")[0] == 0
    shorter = {"glyphs": ["--data-dir", easy_glyphs, "--epochs", 2],
               "cifar100": ["--data-dir", "cifar", "--epochs", 1, "--teacher-checkpoint",
                            "cifar100_resnet56.pth"],
               "folder": ["--epochs", 2, "--image-size", 16, "--teacher", "resnet8",
                          "--teacher-checkpoint", color_teacher, "--no-pretrained"]}
    ran = 0
    for line in COMMANDS:
        words = shlex.split(line, comments=True)
        packages = importlib.util.find_spec("onnxscript") or "--export" not in words
        if words[0] == "torchrun" or not packages:
            # test_torchrun.py runs it, in processes of its own.
            ran += 1
            continue
        if words[1] == "train.py":
            dataset = words[words.index("--dataset") + 1] if "--dataset" in words else "glyphs"
            extra = [] if "--resume" in words else shorter[dataset]
            if dataset == "folder" and "ce" in words:
                extra = [word for word in extra if "teacher" not in str(word) and word != "resnet8"]
        elif words[1] == "eval.py":
            extra = ["--data-dir", "cifar"] if "cifar100" in words else []
        else:
            assert words[1:] == ["-m", "pytest"]
            continue
        # In place of the teacher of the 47 classes, that of the three which these glyphs have.
        words = [f"runs/teacher-glyphs-{glyphs.VERSION}-12-epochs-resnet14/last.pt"
                 if word == kept else word for word in words]
        script = train if words[1] == "train.py" else evaluation
        status, out, err = command(script, *words[2:], *extra)
        assert status == 0, (line, err)
        ran += 1
    assert ran >= 18
    # Two seeds, as one row and as one curve.
    assert len(list(Path("runs/glyphs-kd-resnet8").glob("seed*/metrics.jsonl"))) == 2


def test_what_the_text_says_of_glyphs():
    assert (f"{len(glyphs.CLASSES)} classes of characters at {glyphs.SIDE} pixels"
            in " ".join(README.split()))


def test_the_worked_row():
    text = " ".join(README.split())
    top, read, of_label, label, *after = re.search(
        r"turns the logits (\d+) of '(\w+)' and (\d+) of '(\w+)' into (\d+) and (\d+)",
        text).groups()
    assert f"The label is '{label}'; the teacher reads '{read}'." in text
    # Another class stays.
    swapped = swap(torch.tensor([[float(top), float(of_label), 3]]), torch.tensor([1]))
    assert swapped.tolist() == [[*map(float, after), 3]]
    # It is the row of the picture above it, which the notebook draws.
    shown, = re.findall(r"logits: (\S+) of '(\w+)', which is read, and (\S+) of '(\w+)', the label",
                        (ROOT / "analysis.ipynb").read_text(encoding="utf-8"))
    assert (f"{float(shown[0]):.0f}", shown[1], f"{float(shown[2]):.0f}", shown[3]) == (
        top, read, of_label, label)


def test_what_the_text_says_of_the_gpu():
    report = json.loads((ROOT / "results/benchmark/gpu.json").read_text("utf-8"))
    checks = report["checks"]
    assert not [row for row in checks if row[2] not in ("ok", "info")]
    text = " ".join(README.split())
    device = report["env"]["device_name"]
    assert f"{len(checks)} checks on one {device} ran once, none failed" in text
    assert "Not run: several GPUs, float16, MPS, `--compile` on a GPU." in text
    faster = [row["plain_ms"] / row["graph_ms"] for row in report["cuda_graph"]]
    assert min(faster) > 4.5 and max(faster) < 6 and "a step about five times as fast" in text


@pytest.mark.parametrize("what", re.findall(r"<!-- table: (.+?) -->", PAGES))
def test_the_tables_are_what_the_logs_give(what):
    folder, *against = what.split(" against ")
    in_readme = re.search(rf"<!-- table: {what} -->\n(.*?)\n<!-- end -->", PAGES, re.S).group(1)
    assert in_readme == table(read_rows(ROOT / folder), *against)


def test_what_the_text_says_of_the_vit_that_teaches():
    rows = read_rows(ROOT / "results/glyphs/vit-teacher")
    kd, sld = (top1_difference(rows[row], rows["student-alone"]) for row in ("kd", "sld"))
    for said, (mean, low, high, _) in (("KD brings", kd), ("SLD", sld)):
        assert f"{said} {mean:+.2f} " in TEXT and f"({low:+.2f} to {high:+.2f})" in TEXT
        assert low < 0 < high
    _, rows = read_run(ROOT / "results/teachers/glyphs-vit/seed0")
    assert f"`results/teachers/glyphs-vit`: {rows[-1]['test_top1']:.2f} %" in TEXT


def test_the_teacher_is_stable():
    top1 = [value for row in read_rows(ROOT / "results/checks/stability").values()
            for value in last_top1(row).values()]
    assert f"from {min(top1):.2f} to {max(top1):.2f} %" in TEXT and len(top1) == 12
    assert max(top1) - min(top1) <= 1.5


def test_the_teachers_errors_are_those_of_the_notebook():
    said = re.search(r"it errs on .*?strong views \(.*?\)", PAGES, re.S).group()
    cells = json.loads((ROOT / "analysis.ipynb").read_text(encoding="utf-8"))["cells"]
    lines = [text for cell in cells for output in cell.get("outputs", [])
             for text in output.get("text", [])]
    shown = [text for text in lines if "the teacher errs on" in text]
    assert re.findall(r"\d+\.\d", said) == re.findall(r"\d+\.\d", "".join(shown))
    assert len(shown) == 3
    # Of the strong views: the label second, below rank 10, and the probability moved.
    line, = [text for text in lines if text.startswith("teacher, strong views")]
    _, far, _ = re.findall(r"(\d+) %", line)
    assert f"In {far} % of these last errors the label is below rank 10" in TEXT


@pytest.mark.parametrize("student, groups, methods", [
    # Not mlkd, which was not tuned, as the page says, nor what somebody else has added.
    ("resnet8", ("tuning/glyphs", "tuning/glyphs-neighbours"), {"ce", "kd", "sld", "dkd", "rld"}),
    ("vit_nano", ("tuning/vit",), {"ce", "kd", "sld"})])
def test_the_rates_are_the_best_of_their_grids_and_inside_them(student, groups, methods):
    """On validation images: mean of the last epoch over the seeds, for each method."""
    best = {}
    rows = [row for group in groups for row in
            read_rows(ROOT / "results" / group).values()]
    for row in rows:
        config = next(iter(row.values()))[0]
        assert config["evaluate"] == "val" and config["student"] == student
        mean = np.mean(list(last_top1(row).values()))
        best.setdefault(config["method"], {})[config["lr"]] = mean
    assert best.keys() == methods
    for method, by_rate in best.items():
        rate = train.resolve(train.Settings(method=method, student=student)).lr
        assert rate == max(by_rate, key=by_rate.get), (method, by_rate)
        assert min(by_rate) < rate < max(by_rate)
    if student == "resnet8":
        flat = [top1 for rate, top1 in best["kd"].items() if rate >= 0.2]
        assert f"from 0.2 to 0.8 lie within {max(flat) - min(flat):.1f} points" in TEXT
        mlkd, sld = (train.resolve(train.Settings(method=name)).lr for name in ("mlkd", "sld"))
        assert mlkd == sld and "mlkd was not tuned and has sld's" in TEXT
        three = {row[0][0]["lr"]: np.mean([last_top1(row)[k] for k in range(3)])
                 for row in rows if row[0][0]["method"] == "kd"}
        assert f"three seeds put {three[0.2] - three[0.4]:.2f} points above 0.4" in TEXT


@pytest.mark.parametrize("group, methods", [
    ("tuning/photographs-teacher", {"ce"}),
    ("tuning/photographs", {"ce", "kd", "sld", "dkd", "rld", "mlkd"})])
def test_the_rates_for_photographs_are_the_best_of_their_grids(group, methods):
    """And inside them, on the 202 validation images of TrashNet."""
    grids = {}
    for row in read_rows(ROOT / "results" / group).values():
        config = row[0][0]
        assert config["evaluate"] == "val" and config["pretrained"]
        if config["optimizer"] == "adamw":
            grids.setdefault(config["method"], {})[config["lr"]] = last_top1(row)[0]
    for method in methods:
        by_rate = grids[method]
        s = train.resolve(train.Settings(method=method, dataset="folder", student="mobilenet_v2"))
        assert s.optimizer == "adamw" and by_rate[s.lr] == max(by_rate.values()), (method, by_rate)
        # Of the teacher's, which is as good at the upper one, there are two.
        assert len(by_rate) == 2 or min(by_rate) < s.lr < max(by_rate)
    if "dkd" in methods:
        far = [grids["ce"][s.lr] - max(grids[method].values()) for method in ("dkd", "rld", "mlkd")]
        assert f"lie {min(far):.0f} to {max(far):.0f} points below the student alone" in TEXT


def photographs_table():
    """Markdown: the student with each method, and its teacher alone, by their logs."""
    lines = []
    for name, network, size, methods in (
            ("student, squeezenet1_0", "squeezenet1_0", 112, ("ce", "kd", "sld")),
            ("teacher, mobilenet_v2", "mobilenet_v2", 112, ("ce",)),
            ("… at 224 pixels", "mobilenet_v2-224px", 224, ("ce",))):
        group = ROOT / "results/photographs" / network
        rows, line = read_rows(group), [name]
        for method in ("ce", "kd", "sld"):
            if method in methods:
                config, _ = rows[method][0]
                s = train.resolve(train.Settings(method=method, dataset="folder",
                                                 student=network.removesuffix("-224px")))
                assert all(config[k] == getattr(s, k) for k in
                           ("student", "lr", "optimizer", "epochs", "weight_decay", "pretrained"))
                assert config["image_size"] == size and len(rows[method]) == 3
                line.append(mean_and_sd(last_top1(rows[method])))
            else:
                line.append("")
        costs = [json.loads(path.read_text("utf-8")) for path in group.glob("ce/seed*/final.json")]
        lines.append([*line, f"{costs[0]['parameters']:,}", f"{costs[0]['megabytes']:.1f}",
                      f"{min(cost['milliseconds'] for cost in costs):.1f}"])
    return narrow(markdown(
        ["network", "alone", "KD", "SLD", "parameters", "MB", "ms an image"], lines))


def test_the_table_of_photographs_is_what_the_logs_give():
    assert f"\n\n{photographs_table()}\n\n" in README
    assert "distilling brought nothing" in TEXT
    rows = read_rows(ROOT / "results/photographs/squeezenet1_0")
    ce, *taught = (np.mean([*last_top1(rows[method]).values()]) for method in ("ce", "kd", "sld"))
    assert max(taught) <= ce + 1e-9
    # By default, at 224 pixels, fine-tuning beats a classifier on frozen features, 80 %.
    assert min(last_top1(read_rows(ROOT / "results/photographs/mobilenet_v2-224px")["ce"])
               .values()) >= 82


def test_the_sample_output_is_that_of_the_committed_run():
    sample = re.search(r"```\n(teacher .*?)```", README, re.S).group(1)
    _, rows = read_run(ROOT / "results/glyphs/default-run/sld/seed0")
    s = train.resolve(train.Settings(method="sld"))
    lines = [line for line in sample.splitlines() if line.strip()[:1].isdigit()]
    assert lines == [console.epoch_line(row, s) for row in (rows[0], rows[-1])]
    assert f"\n{console.legend(s).splitlines()[-1]}\n" in sample
    # Every column has its explanation, and no other.
    names = {head.format(part="test") for head, *_ in console.COLUMNS}
    assert names == {name for line in re.findall(r"^- .*?(?=\n-|\n\n)", README.split("## Read")[0],
                                                 re.S | re.M)
                     for name in re.findall(r"`([^` ]+)`", line)}
    last = rows[-1]["test_top1"], rows[-1]["best_top1"]
    assert f"last epoch {last[0]:.2f} %, best {last[1]:.2f} % (selected on test)" in sample
    teacher = read_run(ROOT / "results/teachers/resnet14/seed1000")[1][-1]["test_top1"]
    assert f"{teacher:.2f} % test top-1" in sample
    text = " ".join(README.split())
    minutes = sum(row["seconds"] for row in rows) / 60
    assert f"Training took {minutes:.1f} minutes (float32, two cores of an Intel Xeon)" in text
    env = json.loads((ROOT / "results/glyphs/default-run/sld/seed0/env.json").read_text("utf-8"))
    assert (env["device_name"], env["threads"]) == ("Intel(R) Xeon(R) Processor", 2)


@pytest.mark.parametrize("titles", re.findall(r"<!-- benchmark: (.+?) -->", PAGES))
def test_the_speeds_are_what_the_benchmark_wrote(titles):
    found = re.search(rf"<!-- benchmark: {titles} -->\n(.*?)\n<!-- end -->", PAGES, re.S)
    in_readme = found.group(1)
    reports = [json.loads(path.read_text(encoding="utf-8"))
               for path in (ROOT / "results/benchmark").glob("*.json")]
    report = dict(tables={k: v for each in reports for k, v in each.get("tables", {}).items()})
    assert in_readme == "\n\n".join(benchmark.render(report, title) for title in titles.split(", "))


def test_each_committed_run_has_its_settings_and_every_epoch():
    runs = sorted((ROOT / "results").rglob("metrics.jsonl"))
    assert runs
    for path in runs:
        config, rows = read_run(path.parent)
        # A run of days may stand here unfinished, with the checkpoint from which it goes on.
        last = len(rows) if (path.parent / "last.pt").exists() else config["epochs"]
        assert [row["epoch"] for row in rows] == list(range(1, last + 1)), path
        assert (path.parent / "env.json").exists()


def test_the_loss_in_ones_own_loop():
    """The README's six lines, on a batch of noise."""
    loop, = re.findall(r"```python\n(.*?)```", README, re.S)
    student, teacher = create_model("resnet8", 3), create_model("resnet8", 3).eval()
    before = [p.clone() for p in student.parameters()]
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    names = dict(student=student, teacher=teacher, optimizer=optimizer, epochs=1, torch=torch,
                 loader=[(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0]))])
    exec(loop, names)
    assert any(not torch.equal(a, b) for a, b in zip(before, student.parameters()))

