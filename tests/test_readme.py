"""The README's commands run, shortened by flags only, and its tables are what the logs give."""
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

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = README + (ROOT / "results/README.md").read_text(encoding="utf-8")
COMMANDS = [line.split("&&")[-1].strip() for block in re.findall(r"```sh\n(.*?)```", README, re.S)
            for line in block.splitlines()]


def test_the_two_commands_stand_in_the_readme_and_the_gate():
    assert "pip install -r requirements.txt && python train.py --method sld" in README
    assert "pip install -r requirements.txt && python -m pytest" in README
    assert "python -m pytest" in (ROOT / ".ci/run").read_text()


def constant_teacher(name, classes, path):
    """Always says class 0, which is most of the test images below: enough to pass the door."""
    model = create_model(name, classes)
    torch.nn.init.zeros_(model.fc.weight)
    with torch.no_grad():
        model.fc.bias[0] = 1
    torch.save(model.state_dict(), path)


def test_every_command_runs(easy_glyphs, colors, color_teacher, command, tmp_path, monkeypatch):
    shutil.copytree(colors, "photos")
    shutil.copytree(ROOT / "results", "results")
    for k in range(100):
        for part, n in (("train", 1), ("test", 1 + 50 * (k == 0))):
            (tmp_path / f"cifar/{part}/{k:02d}").mkdir(parents=True)
            for i in range(n):
                image = Image.new("RGB", (32, 32), (k, 50, i))
                image.save(tmp_path / f"cifar/{part}/{k:02d}/{i}.png")
    constant_teacher("resnet56", 100, "cifar100_resnet56.pth")
    assert command(train, "--method", "ce", "--data-dir", easy_glyphs, "--student", "resnet14",
                   "--epochs", 3, "--lr", 0.1, "--batch-size", 16, "--run-dir",
                   "runs/teacher-glyphs-resnet14")[0] == 0
    shorter = {"glyphs": ["--data-dir", easy_glyphs, "--epochs", 2],
               "cifar100": ["--data-dir", "cifar", "--epochs", 1, "--teacher-checkpoint",
                            "cifar100_resnet56.pth"],
               "folder": ["--epochs", 2, "--image-size", 16, "--teacher", "resnet8",
                          "--teacher-checkpoint", color_teacher]}
    ran = 0
    for line in COMMANDS:
        words = shlex.split(line)
        if words[1] == "train.py":
            dataset = words[words.index("--dataset") + 1] if "--dataset" in words else "glyphs"
            extra = [] if "--resume" in words else shorter[dataset]
        elif words[1] == "eval.py":
            extra = ["--data-dir", "cifar"] if "cifar100" in words else []
        else:
            assert words[1:] == ["-m", "pytest"]
            continue
        script = train if words[1] == "train.py" else evaluation
        status, out, err = command(script, *words[2:], *extra)
        assert status == 0, (line, err)
        ran += 1
    assert ran >= 15


@pytest.mark.parametrize("what", re.findall(r"<!-- table: (.+?) -->", PAGES))
def test_the_tables_are_what_the_logs_give(what):
    folder, *against = what.split(" against ")
    in_readme = re.search(rf"<!-- table: {what} -->\n(.*?)\n<!-- end -->", PAGES, re.S).group(1)
    assert in_readme == evaluation.table(ROOT / folder, *against)


def test_what_the_text_says_of_the_recipes_is_what_their_logs_show():
    rows = evaluation.read_rows(ROOT / "results/recipes")
    twice = {name: evaluation.last_top1(row)[0]
             for name, row in evaluation.read_rows(ROOT / "results/recipes-twice").items()}
    assert ("three seeds show no difference between KD and SLD, and each is at most a point above "
            "a student alone") in README
    mean, low, high = evaluation.difference(rows["3-sld"], rows["2-kd"])
    assert low < 0 < high
    assert all(0 < evaluation.difference(rows[name], rows["1-ce"])[0] < 1
               for name in ("2-kd", "3-sld"))
    assert "After twice the epochs the student alone is ahead of both" in README
    assert max(twice, key=twice.get) == "1-ce"
    # results/README.md: "No row gains three points".
    assert all(twice[name] - evaluation.last_top1(rows[name])[0] < 3 for name in rows)


def test_the_teachers_errors_are_those_of_the_notebook():
    said = re.search(r"it errs on .*?strong views \(.*?\)", PAGES, re.S).group()
    cells = json.loads((ROOT / "analysis.ipynb").read_text(encoding="utf-8"))["cells"]
    shown = "".join(text for cell in cells for output in cell.get("outputs", [])
                    for text in output.get("text", []) if "the teacher errs on" in text)
    assert re.findall(r"\d+\.\d", said) == re.findall(r"\d+\.\d", shown)
    assert len(shown.splitlines()) == 3


def test_the_rates_are_the_best_of_their_grids_and_inside_them():
    """On validation images: the last epoch, averaged over seeds, of each method and the teacher."""
    best = {}
    for folder in ("tuning", "tuning-teacher"):
        for row in evaluation.read_rows(ROOT / "results" / folder).values():
            config = next(iter(row.values()))[0]
            assert config["evaluate"] == "val"
            mean = np.mean(list(evaluation.last_top1(row).values()))
            best.setdefault((config["method"], config["student"]), {})[config["lr"]] = mean
    assert len(best) == 4
    for (method, student), by_rate in best.items():
        rate = train.resolve(train.Settings(method=method, student=student)).lr
        assert rate == max(by_rate, key=by_rate.get), (method, student, by_rate)
        assert min(by_rate) < rate < max(by_rate)


def test_the_sample_output_is_that_of_the_committed_run():
    sample = " ".join(re.search(r"epoch +lr .*?last epoch", README, re.S).group().split())
    for row in evaluation.read_run(ROOT / "results/default-run/sld/seed0")[1]:
        assert f"{row['train_top1']:.2f} {row['test_top1']:.2f} {row['best_top1']:.2f}" in sample


@pytest.mark.parametrize("titles", re.findall(r"<!-- benchmark: (.+?) -->", PAGES))
def test_the_speeds_are_what_the_benchmark_wrote(titles):
    found = re.search(rf"<!-- benchmark: {titles} -->\n(.*?)\n<!-- end -->", PAGES, re.S)
    in_readme = found.group(1)
    report = json.loads((ROOT / "results/benchmark/cpu.json").read_text(encoding="utf-8"))
    assert in_readme == "\n\n".join(benchmark.render(report, title) for title in titles.split(", "))


def test_each_committed_run_has_its_settings_and_every_epoch():
    runs = sorted((ROOT / "results").rglob("metrics.jsonl"))
    assert runs
    for path in runs:
        config, rows = evaluation.read_run(path.parent)
        assert [row["epoch"] for row in rows] == list(range(1, config["epochs"] + 1)), path
        assert (path.parent / "env.json").exists()
