"""results/: the rows of run.py are experiments that train.py takes, sharing a teacher's logits
changes no digit, and the pages say what the logs show."""
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as evaluation
import train
from data import load
from eval import measure, predict
from results import pages
from results import run as runner
from support import glyphs
from support.checkpoints import load_model, weights_digest
from support.runs import write_json
from support.tables import (
    difference,
    holm,
    interval,
    interval_cell,
    last_top1,
    read_rows,
    read_run,
    top1_difference,
)

ROOT = Path(__file__).parent.parent
LADDER = ROOT / "results/glyphs/ladder"
CIFAR = ROOT / "results/cifar100/ladder"


def text_of(page):
    """Its words, one space apart."""
    return " ".join((ROOT / page).read_text("utf-8").split())


@pytest.mark.parametrize("group", runner.GROUPS)
def test_every_row_is_an_experiment(group, command, monkeypatch):
    seen = {}
    rows, seeds = runner.GROUPS[group]
    for row, flags in rows.items():
        monkeypatch.setattr(train, "run", lambda s, *a, row=row: seen.setdefault(row, s))
        status, _, err = command(train, *flags.split(), "--seed", seeds[0])
        assert status == 0, err
    settings = {row: vars(train.resolve(s)) for row, s in seen.items()}
    assert settings.keys() == rows.keys()
    # No two rows are the same experiment, on as many threads.
    assert len({(row.endswith("2-thread"), str(s)) for row, s in settings.items()}) == len(rows)
    # What is tuned is measured on validation images, by a teacher that does not know them either,
    # unless it is a public one, which knows them all.
    for s in settings.values():
        if group.startswith("tuning"):
            teacher = s["teacher_checkpoint"] or "-val/"
            assert s["evaluate"] == "val" and ("-val/" in teacher or s["dataset"] == "cifar100")


def test_each_row_of_a_ladder_has_its_familys_rate():
    rows = runner.rows_of(("sld", "sort", "student-alone"), {"sld": 0.2, "ce": 1}, "--teacher a",
                          "--epochs 3", {"sort": "--weight-decay 0"})
    assert {row: flags.split() for row, flags in rows.items()} == {
        "student-alone": "--method ce --lr 1 --epochs 3".split(),
        "sld": "--method sld --lr 0.2 --epochs 3 --teacher a".split(),
        "sort": ("--method sld --no-student-swap --teacher-fix sort --weight-decay 0 --lr 0.2 "
                 "--epochs 3 --teacher a").split()}
    assert runner.ROWS.keys() == pages.ROWS.keys() and {*pages.SUMMARY} < pages.ROWS.keys()
    assert {family for family, _ in runner.ROWS.values()} == runner.FAMILIES.keys()


def test_the_weight_of_ce_for_nine_epochs_is_the_best_of_its_grid_and_inside_it():
    means = {}
    for row in read_rows(ROOT / "results/tuning/ce-weight").values():
        config, _ = next(iter(row.values()))
        by_seed = last_top1(row)
        means[config["ce_weight"]] = sum(by_seed.values()) / len(by_seed)
    assert max(means, key=means.get) == runner.CE_WEIGHT
    assert min(means) < runner.CE_WEIGHT < max(means)


def test_rates_and_weights_are_the_best_of_their_grids_and_inside_them():
    """Those of both ladders, on validation images."""
    def top1_by(name, group, family):
        rows = read_rows(ROOT / "results/tuning" / group)
        return {config[name]: epochs[-1]["val_top1"] for row in rows if row.startswith(family)
                for config, epochs in [rows[row][0]]}

    def check(best, top1):
        assert best == max(top1, key=top1.get) and min(top1) < best < max(top1), top1
    for group, rates in (("ladder", runner.RATES_18), ("cifar100", runner.RATES_CIFAR)):
        for family, rate in rates.items():
            check(rate, top1_by("lr", group, f"{family}-lr"))
    for row, (flag, _, weight) in runner.WEIGHTS_18.items():
        top1 = top1_by(flag[2:].replace("-", "_"), "ladder-weights", f"{row}{flag[1:]}")
        if row == "more-ce":
            top1 |= {0.1: top1_by("lr", "ladder", "sld-without-swaps-lr")[0.2]}
            assert max(top1.values()) - min(top1.values()) <= 0.5
        check(weight, top1)
    page = text_of("results/tuning/README.md")
    # This one is at the end of its grid, as the page says.
    top1 = {0.1: top1_by("lr", "cifar100", "sld-without-swaps-lr")[0.1]}
    top1 |= top1_by("ce_weight", "cifar100-weights", "more-ce")
    assert runner.CE_WEIGHT_CIFAR == max(top1, key=top1.get) == max(top1)
    assert round((top1[3] - top1[1]) * 50) == 4 and "3 beats 1 by four images" in page
    top1 = top1_by("lr", "ladder", "sld-without-swaps-lr")
    assert top1[0.2] - top1[0.1] == 100 * 5 / 1600 and "by five images" in page
    assert "From 0.1 to 3 all lie within half a point" in page
    (both, six), on_cifar = ([max(top1_by("lr", group, f"{name}-lr").values())
                              for name in ("kd-both", "sld-without-swaps")]
                             for group in ("ladder", "cifar100"))
    assert both > six and on_cifar[0] < on_cifar[1]
    assert pages.CONTRASTS["Does SLD beat KD on both views?"] == ("sld", "kd-both")
    _, epochs = read_run(ROOT / "results/teachers/resnet14-val/seed1000")
    assert f"(`results/teachers/resnet14-val`, {epochs[-1]['val_top1']:.2f} %)" in page


def test_remembered_logits_change_no_digit(short):
    def numbers(history):
        return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")}
                for row in history]

    alone = numbers(train.run(short(epochs=2), "alone"))
    assert numbers(train.run(short(epochs=2), "first", wrap_teacher=runner.remember)) == alone
    files = sorted(Path("runs/logits").glob("*/*"))

    def silent(teacher, *about):
        # A second row computes nothing.
        teacher.forward = None
        return runner.remember(teacher, *about)
    assert files and numbers(train.run(short(epochs=2), "second", wrap_teacher=silent)) == alone
    assert sorted(Path("runs/logits").glob("*/*")) == files


def test_the_end_of_a_run_is_measured_as_eval_measures_it(short, color_teacher, command):
    for method in ("ce", "kd"):
        train.run(short(epochs=1, method=method), method)
        runner.measure_end(method, (color_teacher, None))
        report = json.loads(Path(method, "final.json").read_text())
        _, out, _ = command(evaluation, method, "--teacher-checkpoint", color_teacher, "--json")
        costs = {report.pop(name) for name in ("parameters", "megabytes", "milliseconds")}
        assert "top1" in report and "teacher_errors_made" in report
        report_of_eval = json.loads(out)
        assert report.items() <= report_of_eval.items()
        assert report_of_eval["comparison"]["student"]["parameters"] in costs
    train.run(short(epochs=1, method="ce", evaluate="val"), "val")
    runner.measure_end("val", None)
    assert not Path("val/final.json").exists()


def test_on_glyphs_it_is_measured_on_fresh_images(easy_glyphs, monkeypatch):
    train.run(train.Settings(method="ce", epochs=1, device="cpu"), "run")
    render, rendered = glyphs.render, []

    def few(n, seed):
        rendered.append(render(n // 1000, seed))
        return rendered[-1]
    monkeypatch.setattr(glyphs, "render", few)
    Path("runs").mkdir()
    for _ in range(2):
        runner.measure_end("run", ("run/last.pt", "resnet8"))
    # Once, and then kept; others than those of training and test.
    ((images, labels),) = rendered
    data = load("glyphs", "data")
    known = {image.numpy().tobytes() for part in (data.train, data.test) for image in part[0]}
    assert len(labels) == 50 and not known & {image.numpy().tobytes() for image in images}
    student, _ = load_model("run", None, data)
    found = measure(predict(student, images, data.mean, data.std), labels)
    report = json.loads(Path("run/final.json").read_text())
    assert found.items() <= report.items() and report["agreement"] == 100


def test_a_row_without_a_teacher_is_measured_beside_that_of_its_group():
    assert runner.teacher_in("--method ce --lr 0.1") is None
    assert runner.teacher_in("--method kd --teacher-checkpoint a.pt --lr 1") == ("a.pt", None)
    assert runner.teacher_in(runner.CIFAR_TEACHER) == ("data/cifar100_resnet20.pth", "resnet20")


def test_what_is_whole_is_left_alone(write_run, monkeypatch, tmp_path):
    """What a second call of run.py would train again, or only measure."""
    class Pool:
        def submit(self, function, flags, threads, out, run, teacher):
            started.append((run, "--resume" in flags, teacher))

    def starts(row, teacher=None):
        started.clear()
        runner.make(Pool(), row, "--method ce", 0, teacher)
        return started
    started = []
    assert starts("results/a/new") == [("results/a/new/seed0", False, None)]
    run = write_run(tmp_path / "results/a/row/seed0", [50])
    # Logs from git, whose weights were never kept.
    assert not starts("results/a/row")
    (run / "last.pt").write_text("weights")
    assert starts("results/a/row", ("t", "n")) == [("results/a/row/seed0", True, ("t", "n"))]
    (run / "final.json").write_text("{}")
    assert not starts("results/a/row")
    # One that was cut off.
    (run / "config.json").write_text(json.dumps(dict(evaluate="test", epochs=2)))
    assert starts("results/a/row") == [("results/a/row/seed0", True, None)]
    # Of a teacher the weights are needed.
    run = write_run(tmp_path / "results/teachers/t/seed0", [50], evaluate="val")
    assert starts("results/teachers/t") == [("runs/results-teachers-t-seed0", False, None)]
    (run / "last.pt").write_text("weights")
    assert not starts("results/teachers/t")


def test_the_table_of_mistakes():
    for row, by_seed in (("1-ce", ((1, 8), (2, 8))), ("2-sld", ((0, 9), (3, 7)))):
        for seed, (made, avoided) in enumerate(by_seed):
            folder = Path(f"group/{row}/seed{seed}")
            folder.mkdir(parents=True)
            write_json(folder / "final.json", dict(
                teacher_errors=10, teacher_errors_made=made, teacher_errors_avoided=avoided))
    first, second = pages.mistakes_table("group", "1-ce").splitlines()[2:]
    assert first == "| 1-ce | 2 | 15.0 | - | - | 80.0 | - | - |"
    # Student's t of one degree of freedom: 12.71 times the standard error, which is 10 here.
    none = "+0.0 (-127.1 to +127.1) | 1"
    assert second == f"| 2-sld | 2 | 15.0 | {none} | 80.0 | {none} |"


def write_final(folder, top1, wrong, write_run):
    """A student with this top-1, whose teacher misreads `wrong` % of the weak views."""
    run = write_run(folder, [top1], seed=int(folder.name.removeprefix("seed")))
    write_json(run / "final.json", dict(top1=top1, nll=0.5, teacher_top1=80, teacher_errors=10,
                                        teacher_errors_made=4, teacher_errors_avoided=3))
    (run / "metrics.jsonl").write_text(json.dumps(dict(
        epoch=1, test_top1=top1, swap_teacher_weak=wrong, swap_teacher_strong=2 * wrong)) + "\n")


def test_the_tables_of_the_ladder_are_made_of_the_fresh_images(tmp_path, write_run, monkeypatch):
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    ladder = tmp_path / "results/glyphs/ladder"
    for row, top1 in {"sld-without-swaps": 80, "only-teacher-swap": 81, "kd-both": 82,
                      "more-ce": 79.5, "sld": 81, "student-alone-both": 78, "mask": 80.5}.items():
        for seed in range(3):
            write_final(ladder / f"{row}/seed{seed}", top1 + seed, 9, write_run)
    for row, top1 in {"sld-without-swaps": 60, "only-teacher-swap": 66, "more-ce": 64, "sld": 67,
                      "mask": 63}.items():
        for seed in range(2):
            write_final(tmp_path / f"results/glyphs/teachers-by-error/3-epochs/{row}/seed{seed}",
                        top1 + 0.1 * seed, 35, write_run)

    lines = pages.ladder_table(ladder, "sld-without-swaps").splitlines()
    # In the order of pages.ROWS.
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| student-alone-both", "| kd-both", "| sld-without-swaps", "| more-ce", "| mask",
        "| only-teacher-swap", "| sld"]
    assert lines[4] == "| sld-without-swaps | 3 | 81.00 ± 1.00 | - | 0.500 | 40.0 | 30.0 |"
    assert "| +1.00 (+1.00 to +1.00) |" in lines[7]

    contrasts = pages.contrasts_table(ladder).splitlines()[2:]
    assert [line.split(" | ")[2] for line in contrasts] == [
        "+1.00 (+1.00 to +1.00)", "-1.00 (-1.00 to -1.00)", "+1.50 (+1.50 to +1.50)"]
    # Drawn: a true difference of that size is shown in 80 % of experiments with this noise.
    rng, values = np.random.default_rng(0), [0.3, 0.5, 0.2, 0.6]
    found = interval(values)
    least = pages.could_be_seen(found, 4)
    drawn = least + np.std(values, ddof=1) * rng.standard_normal((2000, 4))
    assert np.mean([interval(row).low > 0 for row in drawn]) == pytest.approx(0.8, abs=0.03)

    found = pages.gains_by_teacher()
    assert [(name, theirs, wrong) for name, theirs, wrong, *_ in found] == [
        ("12 epochs", 80, [9, 18]), ("3 epochs", 80, [35, 70])]
    gains = [{row: gain.mean for row, gain in gains.items()} for *_, gains in found]
    assert gains[0]["only-teacher-swap"] == 1 and gains[0]["student-alone-both"] == -2
    # The ladder's student alone, with the seeds that both have.
    assert gains[1]["student-alone-both"] == pytest.approx((78 - 60 + 79 - 60.1) / 2)
    assert gains[1]["sld"] == pytest.approx(7) and gains[1]["mask"] == pytest.approx(3)
    table = pages.gains_table().splitlines()
    assert table[3].startswith(
        "| 3 epochs | 2 | 80.00 | 35.0/70.0 | 60.05 | +3.00 (+3.00 to +3.00) | +6.00")
    # A ladder that is not whole yet.
    for row in ("mask", "more-ce"):
        shutil.rmtree(tmp_path / f"results/glyphs/teachers-by-error/3-epochs/{row}")
    assert pages.gains_by_teacher()[1][4].keys() < gains[1].keys()
    shutil.rmtree(tmp_path / "results/glyphs/teachers-by-error/3-epochs/sld-without-swaps")
    assert [name for name, *_ in pages.gains_by_teacher()] == ["12 epochs"]
    drawn = [{line.get_color(): line.get_ydata() for line in ax.lines if line.get_marker() == "o"}
             for ax in pages.draw_gains(found).axes]
    assert drawn[0][pages.GAINS["sld"]] == pytest.approx([82, 67.05])
    assert drawn[1][pages.GAINS["sld"]] == pytest.approx([1, 7])
    assert drawn[0]["black"] == pytest.approx([81, 60.05]) and "black" not in drawn[1]


def test_the_summary(tmp_path, write_run, monkeypatch):
    """Two views, or a teacher, make a step dearer."""
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    for k, row in enumerate(pages.SUMMARY):
        for seed in range(2):
            run = write_run(tmp_path / f"ladder/{row}/seed{seed}", [50], seed=seed,
                            teacher="resnet14" if k > 1 else None,
                            views="weak" if row in ("student-alone", "kd") else "both")
            write_json(run / "final.json", dict(top1=80 + k + seed, teacher_errors=10,
                                                teacher_errors_made=4, teacher_errors_avoided=3,
                                                teacher_top1=84))
            run = write_run(tmp_path / f"results/cifar100/ladder/{row}/seed{seed}", [1], seed=seed)
            write_json(run / "final.json", dict(top1=50 + k, teacher_top1=68.8))
    shutil.rmtree(tmp_path / "results/cifar100/ladder/student-alone-both")
    teacher, *lines = pages.summary_table(tmp_path / "ladder").splitlines()[2:]
    assert teacher == "|teacher||84.00|68.80||"
    assert lines[0] == "|student alone|1.0|80.50±0.71|50.00±0.00|40/30|"
    assert lines[1] == "|student alone, both views|2.0|81.50±0.71||40/30|"
    assert lines[3] == "|KD, both views, T = 4|3.4|83.50±0.71|53.00±0.00|40/30|"
    assert [line.split("|")[2] for line in lines] == ["1.0", "2.0", "1.7", *5 * ["3.4"]]


@pytest.mark.parametrize("kind", [kind for kind in pages.TABLES if kind != "table"])
def test_the_other_tables_are_what_the_files_give(kind):
    every = [ROOT / "README.md", *(ROOT / "results").rglob("README.md")]
    tables = re.findall(rf"<!-- {kind}: (.+?) -->\n(.*?)\n<!-- end -->",
                        "\n".join(page.read_text("utf-8") for page in every), re.S)
    # Of other teachers there are no students yet.
    assert tables or (kind == "gains" and len(pages.gains_by_teacher()) == 1)
    for what, shown in tables:
        folder, *against = what.split(" against ")
        assert shown == pages.TABLES[kind](ROOT / folder, *against)


def test_the_ladder_is_the_experiment_that_the_pages_describe():
    rows, made = read_rows(LADDER), pages.top1_of(LADDER)
    for row in runner.ASKED | {*pages.SUMMARY}:
        assert [*rows[row]] == [*made[row]] == [0, 1, 2, 3, 4], row
    flags = runner.GROUPS["glyphs/ladder"][0]
    for row, by_seed in rows.items():
        words = dict(zip(flags[row].split(), flags[row].split()[1:]))
        for config, _ in by_seed.values():
            assert (config["student"], config["epochs"]) == ("resnet8", 18)
            assert config["lr"] == float(words["--lr"]) and config["method"] == words["--method"]
            assert config["teacher"] == (None if config["method"] == "ce" else "resnet14")
    assert {json.loads(path.read_text("utf-8"))["n"] for path in LADDER.glob("*/*/final.json")
            } == {50_000}
    # SLD without its swaps is KD with SLD's views, temperatures and rate.
    ours, theirs = (rows[row][0][0] for row in ("only-teacher-swap", "sld-without-swaps"))
    differ = {k for k in ours if ours[k] != theirs[k]}
    assert differ <= {"method", "student_swap", "teacher_fix", "gamma", "detach"}, differ
    for page in ("README.md", "results/README.md"):
        assert "50,000" in text_of(page) and "five seeds" in text_of(page)


def test_what_the_readme_says_of_the_ladder():
    text = text_of("README.md")
    whole, half, nine = (pages.top1_of(LADDER.parent / name)
                         for name in ("ladder", "ladder-half-rate", "ladder-9-epochs"))
    (swap, kd, ce), at_half, at_nine = (
        [difference(top1[a], top1[b]) for a, b in pages.CONTRASTS.values()]
        for top1 in (whole, half, nine))
    assert "the teacher swap adds " + interval_cell(swap).replace(" ", " points ", 1) in text
    assert f"SLD beats KD on both views by {interval_cell(kd)};" in text
    weight, one = runner.WEIGHTS_18["more-ce"][-1], difference(whole["only-teacher-swap"],
                                                               whole["more-ce-1"])
    assert (f"beats a CE weight of {weight:g} by {interval_cell(ce)}, but is not shown to beat 1."
            ) in text
    assert one.low < 0 < min(found.low for found in (swap, ce, kd))
    # The results page: "SLD, with both swaps, beats KD on both views by as much".
    assert round(2 * swap.mean) == round(2 * kd.mean) == 1
    assert "gains half a point from the teacher swap" in text
    assert "At nine epochs, the default, none is shown; KD has the best mean." in text
    means = {row: np.mean([*by_seed.values()]) for row, by_seed in nine.items()}
    assert max(means, key=means.get) == "kd-both"
    assert "The answers stay." in text_of("results/README.md")
    assert min(found.low for found in at_half) > 0
    assert all(found.low < 0 < found.high for found in at_nine)
    # At nine epochs KD has a higher rate than SLD.
    kd, sld = (read_rows(LADDER.parent / "ladder-9-epochs")[row][0][0]["lr"]
               for row in ("kd-both", "sld"))
    assert kd == 4 * sld and "at four times the rate" in text_of("results/README.md")
    for top1, more in ((half, {"student-alone-both"}), (nine, set())):
        assert {row: len(seeds) for row, seeds in top1.items()} == dict.fromkeys(
            runner.ASKED | more, 5)
    for row, by_seed in read_rows(LADDER.parent / "ladder-half-rate").items():
        assert {config["lr"] for config, _ in by_seed.values()} == {
            runner.RATES_18[runner.ROWS[row][0]] / 2}
    # What is not shown there, or elsewhere.
    vit, cifar = read_rows(ROOT / "results/glyphs/vit"), pages.top1_of(CIFAR)
    found = [top1_difference(vit["only-teacher-swap"], vit["sld-without-swaps"]),
             difference(cifar["only-teacher-swap"], cifar["sld-without-swaps"])]
    kd, sld = (difference(whole[row], whole["student-alone-both"]) for row in ("kd-both", "sld"))
    assert (f"Asked later, uncorrected: SLD is {interval_cell(sld)} above the student alone on "
            "both views; neither the teacher swap alone nor KD is shown to be.") in text
    swap = difference(whole["only-teacher-swap"], whole["student-alone-both"])
    assert max(kd.low, swap.low) < 0 < sld.low
    sld = difference(half["sld"], half["student-alone-both"])
    full = difference(half["sld"], whole["student-alone-both"])
    assert (f"Above the student alone on both views SLD is {interval_cell(sld)} here, and "
            f"{interval_cell(full)} above that row at its full rate.") in text_of(
        "results/README.md") and min(sld.low, full.low) > 0
    alone = [difference(half[row], half["student-alone"]) for row in ("kd-both", "sld")]
    page = text_of("results/README.md")
    assert ("is not shown to beat it: {}. SLD does: {}.".format(*map(interval_cell, alone))) in page
    assert alone[0].low < 0 < alone[1].low
    assert "Limits: the teacher swap brings a ViT student {}, on CIFAR-100 {}: not shown.".format(
        *map(interval_cell, found)) in text
    assert max(interval.low for interval in found) < 0 < min(interval.high for interval in found)
    assert {len(row) for row in vit.values()} == {5}
    assert {len(row) for row in cifar.values()} == {3}
    assert {config["epochs"] for row in read_rows(CIFAR).values() for config, _ in row.values()
            } == {20} and "for 20 epochs, three seeds" in text


def test_what_the_pages_say_of_other_teachers():
    """Those that err more often, and less."""
    text, alone = text_of("results/README.md"), pages.top1_of(LADDER)["student-alone-both"]
    found = {n: pages.top1_of(ROOT / pages.TEACHERS[f"{n} epochs"]) | {"alone": alone}
             for n in (3, 2)}
    for pair, said in {
            ("only-teacher-swap", "mask"): "out where the teacher errs, by {} and {}, so more",
            ("more-ce-3", "sld"): "a CE weight of 3 brings more than SLD there, by {} and {},",
            ("alone", "sld"): "the student alone on both views is above SLD by {} and {}:",
            }.items():
        both = [difference(top1[pair[0]], top1[pair[1]]) for top1 in found.values()]
        assert said.format(*map(interval_cell, both)) in text, pair
        assert min(interval.low for interval in both) > 0
    good = pages.top1_of(ROOT / pages.TEACHERS["36 epochs"]) | {"alone": alone}
    harm, gain = (difference(good[a], good[b]) for a, b in (
        ("more-ce-3", "sld-without-swaps"), ("sld-without-swaps", "alone")))
    assert f"a CE weight of 3 is at {interval_cell(harm)}." in text and harm.high < 0
    assert f"SLD without its swaps is {interval_cell(gain)} above the student alone" in text
    assert gain.low > 0
    # From the ladder's teacher on, whatever is done gains more where the teacher errs more.
    _, _, errors, _, gains = zip(*pages.gains_by_teacher())
    for row in pages.GAINS:
        means = [found[row].mean for found in gains[1:]]
        assert means == sorted(means)
    for row in ("only-teacher-swap", "sld"):
        assert gains[0][row].low < 0 < gains[0][row].high

    def gain_of_the_swap(top1):
        return {seed: top1["only-teacher-swap"][seed] - top1["sld-without-swaps"][seed]
                for seed in range(5)}
    less = difference(gain_of_the_swap(pages.top1_of(LADDER)), gain_of_the_swap(good))
    assert f"brings less than with 12 epochs, by {interval_cell(less)};" in text and less.low > 0
    weak, strong = zip(*errors)
    assert [*weak] == sorted(weak) and (f"misreads {weak[0]:.0f} % of the weak views and "
                                        f"{strong[0]:.0f} % of the strong ones, the") in text
    of = {n: line[2:] for n in (36, 3, 2) for line in pages.gains_by_teacher()
          if line[0] == f"{n} epochs"}
    assert ("Teachers of 36, 3 and 2 epochs misread {:.0f}, {:.0f} and {:.0f} % of weak views, "
            "{:.0f}, {:.0f} and {:.0f} % of strong ones (five seeds, three for 2 epochs). "
            "SLD adds nothing shown, {:.0f} and {:.0f} points; a CE weight of 3: {:.0f}, {:.0f} "
            "and {:.0f}; the student alone has {:.0f} %, SLD {:.0f}, {:.0f} and {:.0f}.".format(
                *(wrong[k] for k in (0, 1) for wrong, _, _ in of.values()),
                *[gains[row].mean for row in ("sld", "more-ce-3") for _, _, gains in of.values()
                  ][1:],
                np.mean([*alone.values()]),
                *(np.mean([*top1["sld"].values()]) for _, top1, _ in of.values()))
            ) in text_of("README.md")
    for n, top1 in {36: good, **found}.items():
        seeds = {3} if n == 2 else {5}
        assert {len(by_seed) for row, by_seed in top1.items() if row != "alone"} == seeds
    # Those of seeds 3 and 4 have other teachers, as the page says.
    for n, taught in ((36, 2), (3, 2), (2, 1)):
        digests = {json.loads(path.read_text("utf-8"))["teacher_digest"] for path in (
            ROOT / pages.TEACHERS[f"{n} epochs"]).glob("*/*/env.json")}
        assert len(digests) == taught
    assert "for seeds 3 and 4 a second one" in text


def test_what_the_pages_say_of_wrong_labels():
    folder, text = ROOT / "results/glyphs/noisy-labels", text_of("results/README.md")
    top1, rows = pages.top1_of(folder), read_rows(folder)
    assert top1.keys() == {"student-alone-both", *runner.BY_ERROR}
    assert {tuple(seeds) for seeds in top1.values()} == {(0, 1, 2, 3, 4)}
    assert {config["dataset"] for row in rows.values() for config, _ in row.values()
            } == {"glyphs-noisy"}
    labels = torch.arange(16_000) % len(glyphs.CLASSES)
    assert (glyphs.mislabelled(labels) != labels).float().mean() == pytest.approx(0.2, abs=0.01)
    swap, sld, mask, one, three, alone = (
        difference(top1[row], top1["sld-without-swaps"])
        for row in ("only-teacher-swap", "sld", "mask", "more-ce-1", "more-ce-3",
                    "student-alone-both"))
    gain = difference(top1["sld-without-swaps"], top1["student-alone-both"])
    below = difference(top1["sld"], top1["student-alone-both"])
    assert max(found.high for found in (swap, sld, alone, below)) < 0
    assert min(found.low for found in (mask, one, three)) > 0
    for said in (f"the teacher swap by {interval_cell(swap)}, SLD by {interval_cell(sld)},",
                 f"below the student alone on both views too, by {interval_cell(below)}.",
                 f"disagree (mask) brings {interval_cell(mask)},",
                 f"{interval_cell(one)} and {interval_cell(three)}.",
                 f"SLD without its swaps is {interval_cell(gain)} above the student alone on both"):
        assert said in text, said
    teacher = pages.final_of(folder, lambda report: report["teacher_top1"])["sld"][0]
    wrong = np.mean([epoch["swap_teacher_weak"] for _, log in rows["sld"].values()
                     for epoch in log])
    assert f"reads {teacher:.2f} % of them, and disagrees with {wrong:.0f} % of the labels" in text
    assert ("With a fifth of the labels wrong, for the teacher too, SLD without its swaps changes "
            f"by {swap.mean:+.1f} with the teacher swap, {sld.mean:+.1f} with both, "
            f"{three.mean:+.1f} with a CE weight of 3.") in text_of("README.md")


def test_what_the_pages_say_of_the_teachers_errors():
    alone, kd, sld = ([sum(by_row[row].values()) / 5 for by_row in (
        pages.mistakes_of(LADDER, "made"), pages.mistakes_of(LADDER, "avoided"))]
        for row in ("student-alone", "sld-without-swaps", "sld"))
    cells = json.loads((ROOT / "analysis.ipynb").read_text("utf-8"))["cells"]
    notebook = " ".join(" ".join("".join(cell["source"]) for cell in cells).split())
    assert (f"wrong answer in {alone[0]:.0f} % of these errors, taught by SLD without its swaps in "
            f"{kd[0]:.0f} %, by SLD in {sld[0]:.0f} %; it is right in {alone[1]:.0f}, {kd[1]:.0f} "
            f"and {sld[1]:.0f} %.") in notebook


def test_what_the_text_says_of_the_other_rows_of_the_ladder():
    text, top1 = text_of("results/README.md"), pages.top1_of(LADDER)
    made, alone = pages.mistakes_of(LADDER, "made"), "student-alone-both"

    def minus(a, b, of=top1, decimals=2):
        return interval_cell(difference(of[a], of[b]), decimals)
    for said in (
            f"the student has {np.mean([*top1[alone].values()]):.2f}, "
            f"{minus(alone, 'sld-without-swaps')} above SLD without its swaps.",
            f"Only SLD's interval lies above it, {minus('sld', alone)},",
            f"KD on both views is at {minus('kd-both', alone)} of it, the teacher swap alone at "
            f"{minus('only-teacher-swap', alone)}.",
            f"the student alone on one view: {minus('kd', 'student-alone')}.",
            f"The swap is {minus('only-teacher-swap', 'mask')} above leaving the KL out",
            f"(mask), {minus('only-teacher-swap', 'add-wrong')} above GA there.",
            f"did not tell from it: {minus('only-teacher-swap', 'more-ce-1')} and "
            f"{minus('only-teacher-swap', 'more-ce-3')}.",
            f"not told from the swap: {minus('sort', 'only-teacher-swap')}.",
            f"both swaps from epoch 1 are at {minus('sld-from-epoch-1', 'sld')} of SLD, "
            f"standardized logits at {minus('sld-standardized', 'sld')}.",
            f"swap alone, {minus('dkd', 'only-teacher-swap')} and "
            f"{minus('rld', 'only-teacher-swap')}; SLD is {minus('sld', 'dkd')} and "
            f"{minus('sld', 'rld')} above them",
            f"The student swap alone brings {minus('student-swap', 'sld-without-swaps')}, and SLD "
            f"is {minus('sld', 'only-teacher-swap')} above the teacher swap alone.",
            "mistakes than without swaps, " + minus("sld", "sld-without-swaps", made, 1).replace(
                " ", " points ", 1),
            f"than the student alone on both views, {minus('sld', alone, made, 1)}."):
        assert said in text, said
    for row, other in (("kd", "student-alone"), ("sld-detached", "sld"),
                       ("sort", "only-teacher-swap"), ("dkd", "only-teacher-swap"),
                       ("rld", "only-teacher-swap")):
        found = difference(top1[row], top1[other])
        assert found.low < 0 < found.high
    assert {row for row in top1 if difference(top1[row], top1[alone]).low > 0} - {alone} == {
        "sld", "sld-detached"}
    assert holm({row: difference(top1[row], top1[alone]) for row in top1 if row != alone}
                )["sld"] > 0.05
    teacher = set(pages.final_of(LADDER, lambda report: report["teacher_top1"])["sld"].values())
    assert [f"the teacher reads {value:.2f} % of them" in text for value in teacher] == [True]
    costs = {row: pages.cost_of_step(read_rows(LADDER)[row][0][0]) for row in ("sld", alone)}
    assert (f"A step of SLD costs {costs['sld']:.1f} times one of the student alone on one view, "
            f"{costs['sld'] / costs[alone]:.1f} times one of it on both.") in text
    assert f"CE weight of {runner.WEIGHTS_18['more-ce'][-1]:g} that one seed" in text
    _, epochs = read_run(LADDER / "sld/seed0")
    assert (f"(seed 0, 18 epochs, {epochs[-1]['test_top1']:.2f} % of the test part)"
            ) in text_of("results/glyphs/README.md")


def test_what_the_text_says_of_cifar100():
    text, top1 = text_of("results/README.md"), pages.top1_of(CIFAR)
    nll = pages.final_of(CIFAR, lambda report: report["nll"])

    def minus(a, b):
        return interval_cell(difference(top1[a], top1[b]))
    swap = difference(top1["only-teacher-swap"], top1["sld-without-swaps"])
    seen = pages.could_be_seen(swap, 3)
    for said in (
            f"the teacher swap brings {interval_cell(swap)}, against a larger weight of CE "
            f"{minus('only-teacher-swap', 'more-ce')},",
            f"three seeds would show {seen:.1f} points four times in five",
            f"at T = 4 by {minus('sld', 'kd-both')}, and",
            f"without its swaps it does so by {minus('sld-without-swaps', 'kd-both')};",
            f"SLD minus SLD without its swaps is {minus('sld', 'sld-without-swaps')}.",
            "by {:.3f} ({:.3f} to {:.3f})".format(*difference(nll["sld-without-swaps"],
                                                              nll["sld"])[:3])):
        assert said in text, said
    assert swap.low < -0.5 < 0.5 < swap.high
    # On validation images, which the teacher knows, and on test images.
    val, test = read_rows(ROOT / "results/tuning/cifar100"), read_rows(CIFAR)
    more = {}
    for row, family in (("student-alone", "ce"), ("kd", "kd"), ("kd-both", "kd-both"),
                        ("sld", "sld"), ("sld-without-swaps", "sld-without-swaps")):
        known = val[f"{family}-lr{runner.RATES_CIFAR[family]:g}"][0][1][-1]["val_top1"]
        more[row] = known - test[row][0][1][-1]["test_top1"]
    alone = more.pop("student-alone")
    low, high = min(more.values()), max(more.values())
    assert (f"do {low:.1f} to {high:.1f} points better here than on the test images at seed 0, "
            f"while the student alone does {-alone:.1f} worse"
            ) in text_of("results/tuning/README.md")
    # The teacher's errors on the images that it was trained on.
    epochs = [epoch for _, epochs in read_rows(CIFAR)["sld"].values() for epoch in epochs]
    wrong = [np.mean([epoch[f"swap_teacher_{view}"] for epoch in epochs])
             for view in ("weak", "strong")]
    assert ("misreads {:.1f} % of the weak views of the training images, and {:.1f} % of the strong"
            .format(*wrong)) in text


def test_what_the_text_says_of_the_vits_ladder():
    text = text_of("results/glyphs/vit/README.md")
    rows = read_rows(ROOT / "results/glyphs/vit")
    made = pages.mistakes_of(ROOT / "results/glyphs/vit", "made")
    kd, weak, swaps = "sld-without-swaps", "kd", ("only-teacher-swap", "sld")
    gains = [top1_difference(rows[row], rows[weak])[0] for row in (kd, "sld")]
    assert "over KD on one view {:.1f} points, SLD {:.1f})".format(*gains) in text
    differences = [top1_difference(rows[row], rows[kd]) for row in swaps]
    assert max(d[0] for d in differences) < 0 < min(d[2] for d in differences)
    low, high = min(d[1] for d in differences), max(d[2] for d in differences)
    assert f"with intervals from {low:+.1f} to {high:+.1f}." in text
    taught, alone = (sum(made[row].values()) / 5 for row in (kd, "student-alone"))
    assert f"({taught:.0f} % of the teacher's against {alone:.0f} % alone)" in text
    p = holm({row: difference(made[row], made[kd]) for row in rows if row != kd})
    assert min(p[row] for row in swaps) > 0.05


def test_the_teacher_in_the_repository_is_the_one_of_its_log():
    path = ROOT / train.TEACHERS["glyphs", "resnet14", "test"]
    assert path.stat().st_size < 800_000
    teacher, checkpoint = load_model(path)
    assert checkpoint["classes"] == glyphs.CLASSES
    config, epochs = read_run(path.parent)
    env = json.loads((path.parent / "env.json").read_text("utf-8"))
    assert env["data"] == [glyphs.VERSION] and checkpoint["epoch"] == config["epochs"]
    # The very one of the ladder that is made with it, and of the README's run.
    digests = {json.loads(path.read_text("utf-8"))["teacher_digest"]
               for name in ("glyphs/ladder", "glyphs/default-run")
               for path in (ROOT / "results" / name).rglob("env.json")}
    # The student alone has none.
    assert digests - {None} == {weights_digest(teacher)}
    images, labels = glyphs.render(glyphs.N_TEST, seed=2)
    top1 = measure(predict(teacher, images, checkpoint["mean"], checkpoint["std"]), labels)["top1"]
    # One image in a thousand may fall differently on another processor.
    assert top1 == pytest.approx(epochs[-1]["test_top1"], abs=0.1)


def test_what_the_text_says_of_the_published_row():
    ends = {}
    for row in ("ce", "kd"):
        config, epochs = read_run(ROOT / f"results/cifar100/published/{row}/seed0")
        assert config["epochs"] == len(epochs) == 240 and config["method"] == row
        ends[row] = epochs[-1]["test_top1"]
    readme, page = text_of("README.md"), text_of("results/README.md")
    assert (f"student alone {ends['ce']:.2f} %, KD {ends['kd']:.2f} %; "
            "RepDistiller's table has 69.06 and 70.66.") in readme
    error = 100 * (ends["ce"] / 100 * (1 - ends["ce"] / 100) / 10_000) ** 0.5
    assert f"one standard error is {error:.2f} points." in page
    assert f"The student alone ends at {ends['ce']:.2f} %, KD at {ends['kd']:.2f} %." in page
