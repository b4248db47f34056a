"""The tables are what the logs say, the statistics are Student's and Holm's, and only runs that may
be compared stand in one table."""
import json
import math

import pytest
import torch

import eval as evaluation
from support.errors import UserError
from support.tables import holm, interval, read_rows, table, tables, top1_difference


def cells(out):
    lines = [line for line in out.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_the_table_is_computed_from_the_logs(tmp_path, write_run, command):
    for seed, (ce, kd, kd2) in enumerate([(40, 60, 60), (44, 63, 61), (42, 66, 67)]):
        write_run(tmp_path / f"1-ce/seed{seed}", [10, ce + 5, ce], seed=seed)
        write_run(tmp_path / f"2-kd/seed{seed}", [50, 55, kd], seed=seed)
        write_run(tmp_path / f"3-kd2/seed{seed}", [50, 55, kd2], seed=seed)
    write_run(tmp_path / "4-bad/seed0", [10, 11, 12], seed=0)
    status, out, _ = command(evaluation, "--table", tmp_path)
    # kd - ce: 20, 19, 24, mean 21, sd 2.6458, half-width 4.303 * 2.6458 / sqrt(3) = 6.573
    # kd2 - kd: 0, -2, 1, mean -0.3333, sd 1.5275, half-width 3.795
    assert status == 0 and cells(out) == [
        ["1-ce", "3", "42.00 ± 2.00", "47.00", "-", "-"],
        ["2-kd", "3", "63.00 ± 3.00", "63.00", "+21.00 (+14.43 to +27.57)",
         "better"],
        ["3-kd2", "3", "62.67 ± 3.79", "62.67", "-0.33 (-4.13 to +3.46)",
         "no difference shown"],
        ["4-bad", "1", "12.00", "12.00", "-48.00", "one seed: not known"]]
    assert out.startswith("resnet8, 3 epochs, test top-1 in %:\n\n")
    status, out, _ = command(evaluation, "--table", tmp_path, "--against", "2-kd")
    assert [row[4:] for row in cells(out)] == [
        ["-21.00 (-27.57 to -14.43)", "worse (p = 0.01)"], ["-", "-"],
        ["-0.33 (-4.13 to +3.46)", "no difference shown (p = 0.74)"],
        ["-48.00", "one seed: not known"]]
    assert "difference to 2-kd" in out and "verdict (Holm)" in out
    # Half of 0.05 for the first of two: 6.205 standard errors, not 4.303, of 3.795 and 6.573.
    assert out.endswith("is not shown, in the median row: 9.5 points.\n")
    assert out == table(read_rows(tmp_path), "2-kd") + "\n"
    assert command(evaluation, "--table", tmp_path, "--against", "kd3")[0] == 2


@pytest.mark.parametrize("p", [0.05, 0.05 / 18])
def test_the_quantiles_are_students(p):
    """By integrating the density of Student's t numerically."""
    for df in range(1, 31):
        numbers = torch.randn(df + 1, dtype=torch.float64)
        mean, low, high, _ = interval(numbers.tolist(), 1 - p)
        error = (numbers.std() / (df + 1) ** 0.5).item()
        t = (high - low) / 2 / error
        assert mean == pytest.approx(numbers.mean().item())
        assert (low + high) / 2 == pytest.approx(mean)
        x = torch.linspace(-t, t, 1_000_001, dtype=torch.float64)
        area = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
        density = (1 + x ** 2 / df) ** (-(df + 1) / 2) * area
        assert torch.trapezoid(density, x).item() == pytest.approx(1 - p, abs=1e-5)


def test_rows_with_numbers_stand_by_size(tmp_path, write_run):
    for name in ("lr10", "lr0.3", "lr3", "12-b", "2-a"):
        write_run(tmp_path / name / "seed0", [50], seed=0)
    assert [*read_rows(tmp_path)] == ["2-a", "12-b", "lr0.3", "lr3", "lr10"]


def test_a_row_stands_before_its_numbered_neighbours(tmp_path, write_run):
    for name in ("kd-resnet8-10", "kd-resnet8", "kd-resnet8-2", "ce-resnet8"):
        write_run(tmp_path / name / "seed0", [50], seed=0)
    assert [*read_rows(tmp_path)] == ["ce-resnet8", "kd-resnet8", "kd-resnet8-2", "kd-resnet8-10"]


def test_holm_corrects_for_the_number_of_comparisons(tmp_path, write_run):
    rows = {"base": (0, 0, 0, 0), "far": (2.0, 2.1, 1.9, 2.0), "near": (0.9, 1.2, 0.3, 1.6),
            "same": (0, 0, 0, 0), "none": (0.1, -0.2, 0.2, -0.1)}
    for row, top1 in rows.items():
        for seed, value in enumerate(top1):
            write_run(tmp_path / row / f"seed{seed}", [50 + value], seed=seed)
    runs = read_rows(tmp_path)
    differences = {name: top1_difference(runs[name], runs["base"]) for name in rows}
    del differences["base"]
    raw = {name: found.p for name, found in differences.items()}
    assert raw["far"] < 0.001 < raw["near"] < 0.05 < raw["none"]
    corrected = holm(differences | {"alone": interval([2.0])})
    assert corrected == pytest.approx(
        {"far": 4 * raw["far"], "near": 3 * raw["near"], "none": 1, "same": 1})
    # Alone it is significant, among four it is not.
    assert corrected["near"] > 0.05


def write_kd(write_run, folder, change, whole_row):
    """Rows 1-kd and 2-kd of two seeds; of 2-kd the second seed, or both, are changed."""
    for row, seed in (("1-kd", 0), ("1-kd", 1), ("2-kd", 0), ("2-kd", 1)):
        odd = change if row == "2-kd" and (seed == 1 or whole_row) else {}
        config = dict(lr=0.05, seed=seed, dataset="glyphs", teacher="resnet20",
                      image_size=16) | odd
        accuracies, digest = config.pop("accuracies", [50, 70]), config.pop("digest", "a")
        write_run(folder / row / f"seed{seed}", accuracies, **config)
        env = folder / row / f"seed{seed}/env.json"
        env.write_text(json.dumps(dict(teacher_digest=digest)))


@pytest.mark.parametrize("change, culprit", [
    (dict(lr=0.025), "2-kd mixes runs of different lr"),
    (dict(seed=0), "second run of seed 0"),
    (dict(dataset="cifar10"), "different dataset"),
    (dict(image_size=32), "different image_size"),
    (dict(student="resnet20"), "different student"),
    (dict(teacher="resnet56"), "different teacher"),
    (dict(digest="b"), "different teacher_digest"),
    (dict(accuracies=[50, 55, 60]), "different epochs"),
    (dict(evaluate="val"), "different evaluate")], ids=lambda value: str(value))
def test_a_row_does_not_mix_experiments(tmp_path, write_run, command, change, culprit):
    write_kd(write_run, tmp_path, change, whole_row=False)
    status, _, err = command(evaluation, "--table", tmp_path)
    assert status == 2 and culprit in err and "2-kd" in err and err.count("\n") == 1, err
    assert "1-kd" not in err
    with pytest.raises(UserError, match=culprit):
        read_rows(tmp_path)


@pytest.mark.parametrize("change, what", [
    (dict(dataset="cifar10"), "dataset"), (dict(image_size=32), "image_size"),
    (dict(student="resnet20"), "student"), (dict(teacher="resnet56"), "teacher"),
    (dict(digest="b"), "teacher_digest"), (dict(accuracies=[50, 55, 60]), "epochs"),
    (dict(evaluate="val"), "evaluate")], ids=lambda value: str(value))
def test_rows_that_may_not_be_compared_have_a_table_each(tmp_path, write_run, command, change,
                                                         what):
    write_kd(write_run, tmp_path, change, whole_row=True)
    for seed in range(2):
        # It has no teacher, so it goes with any.
        write_run(tmp_path / f"0-ce/seed{seed}", [50, 60], seed=seed, dataset="glyphs",
                  image_size=16)
    status, out, err = command(evaluation, "--table", tmp_path)
    assert status == 0, err
    first, second = out.split(f"**{what} ")[1:]
    assert [row[0] for row in cells(first)] == ["0-ce", "1-kd"]
    goes_with_both = what.startswith("teacher")
    assert [row[0] for row in cells(second)] == ["0-ce"] * goes_with_both + ["2-kd"]
    # The page's tables hold one experiment, or are refused.
    with pytest.raises(UserError, match=f"different {what}, which cannot be compared") as refusal:
        read_rows(tmp_path)
    assert "2-kd" in str(refusal.value) and "1-kd" not in str(refusal.value)
    # Only the tables that have the row to compare with.
    status, out, _ = command(evaluation, "--table", tmp_path, "--against", "2-kd")
    assert status == 0 and [row[0] for row in cells(out)][-1] == "2-kd" and "1-kd" not in out


def test_a_table_says_in_which_settings_its_rows_differ(tmp_path, write_run):
    common = dict(dataset="glyphs", epochs=1, data_dir="data")
    for row, settings in {"a": dict(method="sld", lr=0.1, temperatures=[1, 2.0]),
                          "b": dict(method="sld", lr=0.05, temperatures=[1, 2.0]),
                          "c": dict(method="ce", lr=0.1, temperatures=None)}.items():
        for seed in range(2):
            write_run(tmp_path / row / f"seed{seed}", [50], seed=seed, **common, **settings)
    *_, head, _, a, b, c = tables(tmp_path).splitlines()
    assert head == "The settings in which the rows differ:"
    assert (a, b, c) == ("- a: method sld, lr 0.1, temperatures 1 2",
                         "- b: method sld, lr 0.05, temperatures 1 2", "- c: method ce, lr 0.1")


def test_the_folder_of_all_runs_makes_a_table(tmp_path, write_run, command):
    """As train.py leaves it: a row for each folder with its seeds, also a run that has none."""
    for name in ("glyphs-sld-resnet8/seed0", "glyphs-sld-resnet8/seed1", "glyphs-kd-resnet8/seed0",
                 "no-teacher-swap", "teacher-glyphs-v5-resnet14", "teacher-x/seed0"):
        write_run(tmp_path / "runs" / name, [50, 60], seed=int(name.endswith("1")), epochs=2)
    write_run(tmp_path / "runs/glyphs-kd-resnet8/seed1", [50], seed=1, epochs=2)
    status, out, err = command(evaluation, "--table", tmp_path / "runs")
    assert status == 0, err
    assert [(row[0], row[1]) for row in cells(out)] == [
        ("glyphs-kd-resnet8", "1"), ("glyphs-sld-resnet8", "2"), ("no-teacher-swap", "1")]
    left_out, = [line for line in out.splitlines() if line.startswith("Left out")]
    assert left_out.endswith("glyphs-kd-resnet8/seed1 has 1 of 2 epochs.")
    assert not [row for row in cells(out) if row[0].startswith("teacher")]
    status, _, err = command(evaluation, "--table", tmp_path / "runs", "--against", "kd")
    assert status == 2 and "choose among glyphs-kd-resnet8, glyphs-sld-resnet8, no-teach" in err


def test_rows_of_one_name_in_two_folders_are_two_rows(tmp_path, write_run, command):
    write_run(tmp_path / "x/kd/seed0", [60, 70], seed=0)
    write_run(tmp_path / "y/kd/seed1", [10, 20], seed=1)
    status, out, _ = command(evaluation, "--table", tmp_path)
    assert status == 0 and [row[0] for row in cells(out)] == ["x/kd", "y/kd"]


@pytest.mark.parametrize("accuracies, config, culprit", [
    ([50, 60], dict(epochs=240), "has 2 of 240 epochs"), ([50, math.nan], {}, "metrics.jsonl"),
    ([50, "60"], {}, "metrics.jsonl"), ([50, 60], dict(image_size=32), "different image_size")])
def test_the_table_refuses_what_is_no_result(tmp_path, write_run, command, accuracies, config,
                                             culprit):
    write_run(tmp_path / "1-ce/seed0", [50, 60], seed=0, image_size=16)
    write_run(tmp_path / "2-kd/seed0", accuracies, **dict(seed=0, image_size=16) | config)
    with pytest.raises(UserError, match=culprit) as refusal:
        read_rows(tmp_path)
    assert "2-kd" in str(refusal.value) and "\n" not in str(refusal.value)
    # A damaged run is refused; one that goes on, or of other images, is not in the way of others.
    status, out, err = command(evaluation, "--table", tmp_path)
    if culprit == "metrics.jsonl":
        assert status == 2 and culprit in err and "2-kd" in err and err.count("\n") == 1
    else:
        assert status == 0 and [row[0] for row in cells(out)][0] == "1-ce" and "2-kd" in out
