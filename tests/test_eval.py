"""eval.py: the metrics against plain Python, foreign checkpoints, the table."""
import json
import math

import pytest
import torch

import eval as evaluation
from data import UserError
from models import create_model


def test_measure_against_plain_python():
    logits, labels = 2 * torch.randn(300, 8, dtype=torch.float64), torch.randint(8, (300,))
    report = evaluation.measure(logits, labels)
    bins, right1, right5, nll = [[0, 0.0, 0] for _ in range(15)], 0, 0, 0.0
    for row, label in zip(logits.tolist(), labels.tolist()):
        p = [math.exp(v) for v in row]
        p = [v / sum(p) for v in p]
        order = sorted(range(8), key=lambda c: -p[c])
        right1, right5 = right1 + (order[0] == label), right5 + (label in order[:5])
        nll -= math.log(p[label])
        cell = bins[min(14, math.ceil(max(p) * 15) - 1)]
        cell[0], cell[1], cell[2] = cell[0] + 1, cell[1] + max(p), cell[2] + (order[0] == label)
    ece = sum(abs(confidence - right) for _, confidence, right in bins) / 300
    expected = dict(top1=right1 / 3, top5=right5 / 3, nll=nll / 300, ece=100 * ece, n=300)
    assert report == pytest.approx(expected)


def test_top5_of_fewer_classes_is_everything():
    assert evaluation.measure(torch.randn(20, 3), torch.randint(3, (20,)))["top5"] == 100


def test_inheritance_counts():
    teacher, student = torch.eye(3)[[0, 1, 2, 2, 2]], torch.eye(3)[[0, 1, 2, 0, 1]]
    report = evaluation.inheritance(student, teacher, torch.tensor([0, 2, 1, 0, 0]))
    assert report == {"teacher_top1": 20, "agreement": pytest.approx(60), "teacher_errors": 4,
                      "teacher_errors_made": 2, "teacher_errors_avoided": 1}


@pytest.mark.parametrize("wrap", [
    lambda s: s, lambda s: {"model": s},
    lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}],
    ids=["bare", "model", "state_dict with module."])
def test_the_fields_checkpoint_forms_load(tmp_path, wrap):
    source = create_model("resnet8", 5)
    torch.save(wrap(source.state_dict()), tmp_path / "x.pt")
    loaded, _ = evaluation.load_model(tmp_path / "x.pt", "resnet8")
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in loaded.state_dict().items())
    assert not loaded.training


def test_a_foreign_checkpoint_is_measured_like_our_own(colors, color_teacher, tmp_path, command):
    torch.save(torch.load(color_teacher, weights_only=True)["model"], tmp_path / "bare.pt")
    own = json.loads(command(evaluation, color_teacher, "--json")[1])
    status, out, err = command(evaluation, color_teacher, "--teacher-checkpoint", color_teacher,
                               "--json")
    assert status == 0
    assert json.loads(out)["agreement"] == 100
    assert json.loads(out)["teacher_errors_avoided"] == 0
    assert set(own) == {"top1", "top5", "nll", "ece", "n"} and own["n"] == 60
    status, out, err = command(evaluation, color_teacher)
    assert status == 0 and f"{own['top1']:.4f}" in out


def write_run(folder, accuracies, **config):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(student="resnet8") | config))
    top1 = config.get("evaluate", "test") + "_top1"
    rows = [json.dumps({"epoch": i, top1: a}) + "\n" for i, a in enumerate(accuracies, 1)]
    (folder / "metrics.jsonl").write_text("".join(rows))
    return folder


def cells(out):
    lines = [line for line in out.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_the_table_is_computed_from_the_logs(tmp_path, command):
    for seed, (ce, kd, kd2) in enumerate([(40, 60, 60), (44, 63, 61), (42, 66, 67)]):
        write_run(tmp_path / f"1-ce/seed{seed}", [10, ce + 5, ce], seed=seed)
        write_run(tmp_path / f"2-kd/seed{seed}", [50, 55, kd], seed=seed)
        write_run(tmp_path / f"3-kd2/seed{seed}", [50, 55, kd2], seed=seed)
    write_run(tmp_path / "4-bad/seed0", [10, 11, 12], seed=0)
    status, out, _ = command(evaluation, "--table", tmp_path)
    # kd - ce: 20, 19, 24, mean 21, sd 2.6458, half-width 4.303 * 2.6458 / sqrt(3) = 6.573
    # kd2 - kd: 0, -2, 1, mean -0.3333, sd 1.5275, half-width 3.795
    assert status == 0 and cells(out) == [
        ["1-ce", "resnet8", "3", "3", "42.00 ± 2.00", "47.00", "-", "-"],
        ["2-kd", "resnet8", "3", "3", "63.00 ± 3.00", "63.00", "+21.00 (+14.43 to +27.57)",
         "better"],
        ["3-kd2", "resnet8", "3", "3", "62.67 ± 3.79", "62.67", "-0.33 (-4.13 to +3.46)",
         "no difference shown"],
        ["4-bad", "resnet8", "3", "1", "12.00", "12.00", "-48.00", "one seed: not known"]]
    status, out, _ = command(evaluation, "--table", tmp_path, "--against", "2-kd")
    assert [row[6:] for row in cells(out)] == [
        ["-21.00 (-27.57 to -14.43)", "worse (p = 0.01)"], ["-", "-"],
        ["-0.33 (-4.13 to +3.46)", "no difference shown (p = 0.74)"],
        ["-48.00", "one seed: not known"]]
    assert "difference to 2-kd" in out and "verdict (Holm)" in out
    # Half of 0.05 for the first of two: 6.205 standard errors, not 4.303, of 3.795 and 6.573.
    assert out.endswith("is not shown, in the median row: 9.5 points.\n")
    assert command(evaluation, "--table", tmp_path, "--against", "kd3")[0] == 2


@pytest.mark.parametrize("p", [0.05, 0.05 / 18])
def test_the_quantiles_are_students(p):
    """By integrating the density of Student's t numerically."""
    for df in range(1, 31):
        t = evaluation.quantile(p, df)
        x = torch.linspace(-t, t, 1_000_001, dtype=torch.float64)
        area = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
        density = (1 + x ** 2 / df) ** (-(df + 1) / 2) * area
        assert torch.trapezoid(density, x).item() == pytest.approx(1 - p, abs=1e-5)


def test_rows_with_numbers_stand_by_size(tmp_path):
    for name in ("lr10", "lr0.3", "lr3", "12-b", "2-a"):
        write_run(tmp_path / name / "seed0", [50], seed=0)
    assert [*evaluation.read_rows(tmp_path)] == ["2-a", "12-b", "lr0.3", "lr3", "lr10"]


def test_holm_corrects_for_the_number_of_comparisons(tmp_path):
    rows = {"base": (0, 0, 0, 0), "far": (2.0, 2.1, 1.9, 2.0), "near": (0.9, 1.2, 0.3, 1.6),
            "same": (0, 0, 0, 0), "none": (0.1, -0.2, 0.2, -0.1)}
    for row, top1 in rows.items():
        for seed, value in enumerate(top1):
            write_run(tmp_path / row / f"seed{seed}", [50 + value], seed=seed)
    runs = evaluation.read_rows(tmp_path)
    raw = {name: evaluation.difference(runs[name], runs["base"])[3] for name in rows}
    del raw["base"]
    assert raw["far"] < 0.001 < raw["near"] < 0.05 < raw["none"]
    corrected = evaluation.holm(raw | {"alone": None})
    assert corrected == pytest.approx(
        {"far": 4 * raw["far"], "near": 3 * raw["near"], "none": 1, "same": 1})
    # Alone it is significant, among four it is not.
    assert corrected["near"] > 0.05


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    import pickle

    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")
    (tmp_path / "bomb.pt").write_bytes(pickle.dumps({"model": Bomb()}))
    torch.save({"model": Bomb()}, tmp_path / "zip.pt")
    for name in ("bomb.pt", "zip.pt"):
        with pytest.raises(UserError, match=f"{name}: not a PyTorch checkpoint"):
            evaluation.load_model(tmp_path / name, "resnet8")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("change, culprit", [
    (dict(lr=0.025), "2-kd mixes runs of different settings"),
    (dict(seed=0), "second run of seed 0"),
    (dict(dataset="cifar10"), "different dataset"),
    (dict(student="resnet20"), "different student"),
    (dict(teacher="resnet56"), "different teacher"),
    (dict(digest="b"), "different teacher's digest"),
    (dict(accuracies=[50, 55, 60]), "different epochs"),
    (dict(evaluate="val"), "different evaluate")], ids=lambda value: str(value))
def test_the_table_refuses_to_mix_experiments(tmp_path, command, change, culprit):
    for row, seed in (("1-kd", 0), ("1-kd", 1), ("2-kd", 0), ("2-kd", 1)):
        odd = change if row == "2-kd" and (seed == 1 or "evaluate" in change) else {}
        config = dict(lr=0.05, seed=seed, dataset="glyphs", teacher="resnet20") | odd
        accuracies, digest = config.pop("accuracies", [50, 70]), config.pop("digest", "a")
        write_run(tmp_path / row / f"seed{seed}", accuracies, **config)
        env = tmp_path / row / f"seed{seed}/env.json"
        env.write_text(json.dumps(dict(teacher_digest=digest)))
    # With these the whole row is odd.
    if set(change) & {"dataset", "student", "teacher"}:
        path = tmp_path / "2-kd/seed0/config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    status, _, err = command(evaluation, "--table", tmp_path)
    assert status == 2 and culprit in err and "2-kd" in err and err.count("\n") == 1, err
    assert "1-kd" not in err


def test_curves_show_what_the_logs_say(tmp_path, command, monkeypatch):
    config = dict(gamma=1, schedule="step")
    write_run(tmp_path / "a", [40, 60], **config)
    write_run(tmp_path / "b", [50, 55, 80], **config)
    for name in "ab":
        path = tmp_path / name / "metrics.jsonl"
        rows = [json.loads(line) | dict(lr=0.1 ** i, loss_ce=1 / (i + 1))
                for i, line in enumerate(path.read_text().splitlines())]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loss, top1, _ = evaluation.plot([tmp_path / "a", tmp_path / "b"]).axes
    drawn = {name: [list(line.get_ydata()) for line in ax.lines if line.get_label() == name]
             for ax, name in ((loss, "loss_ce"), (top1, "test_top1"))}
    assert drawn == {"loss_ce": [[1, 1 / 2], [1, 1 / 2, 1 / 3]],
                     "test_top1": [[40, 60], [50, 55, 80]]}
    marks = [(line.get_label(), line.get_xdata()[0]) for line in top1.lines
             if line.get_label() != "test_top1"]
    assert marks == [("γ", 1.5), ("learning rate falls", 1.5), ("γ", 1.5),
                     ("learning rate falls", 1.5), ("learning rate falls", 2.5)]
    monkeypatch.chdir(tmp_path)
    assert command(evaluation, "--plot", "a", "b")[0] == 0
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    status, _, err = command(evaluation, "--plot", "c")
    assert status == 2 and err.startswith("eval.py: c: ") and err.count("\n") == 1


def test_rows_of_one_name_in_two_folders_are_two_rows(tmp_path, command):
    write_run(tmp_path / "x/kd/seed0", [60, 70], seed=0)
    write_run(tmp_path / "y/kd/seed1", [10, 20], seed=1)
    status, out, _ = command(evaluation, "--table", tmp_path)
    assert status == 0 and [row[0] for row in cells(out)] == ["x/kd", "y/kd"]


@pytest.mark.parametrize("accuracies, config, culprit", [
    ([50, 60], dict(epochs=240), "has 2 of 240 epochs"), ([50, math.nan], {}, "metrics.jsonl"),
    ([50, "60"], {}, "metrics.jsonl"), ([50, 60], dict(image_size=32), "different image_size")])
def test_the_table_refuses_what_is_no_result(tmp_path, command, accuracies, config, culprit):
    write_run(tmp_path / "1-ce/seed0", [50, 60], seed=0, image_size=16)
    write_run(tmp_path / "2-kd/seed0", accuracies, **dict(seed=0, image_size=16) | config)
    status, _, err = command(evaluation, "--table", tmp_path)
    assert status == 2 and culprit in err and "2-kd" in err and err.count("\n") == 1


def test_a_published_network_is_measured_by_its_name(published, imagenet, command, tmp_path):
    published("shufflenet_v2_x0_5", bias=1.0)
    arguments = ("shufflenet_v2_x0_5", "--dataset", "imagenet", "--data-dir")
    status, out, err = command(evaluation, *arguments, imagenet, "--json")
    report = json.loads(out)
    assert status == 0 and report["top1"] == 100 and report["n"] == 20 and "decoding" in err
    assert next((tmp_path / "data").glob("*-val-256px-*.npy")).stat().st_size > 20 * 3 * 256 ** 2
    status, out, err = command(evaluation, "resnet18", *arguments[1:], imagenet)
    *_, line = err.splitlines()
    assert status == 2 and line.startswith("eval.py: resnet18: cannot load resnet18-f37072fd.pth")


def test_predict_names_the_likeliest_classes(published, colors, color_teacher, command, tmp_path):
    files = [str(colors / f"val/{name}/{k}.png") for name in ("red", "blue") for k in (3, 4)]
    status, out, err = command(evaluation, color_teacher, "--predict", *files, "--json")
    report = json.loads(out)
    assert status == 0 and [image["file"] for image in report] == files
    for image, name in zip(report, ("red", "red", "blue", "blue")):
        assert image["classes"][0][0] == name and len(image["classes"]) == 3
        probabilities = [p for _, p in image["classes"]]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1)
    status, out, err = command(evaluation, color_teacher, "--predict", *files, "--device", "cpu")
    assert status == 0 and out.splitlines()[0] == files[0]
    assert out.splitlines()[1] == f"{100 * report[0]['classes'][0][1]:10.2f} %  red"
    # ImageNet's classes have names of their own, and five are shown.
    published("shufflenet_v2_x0_5", bias=9.0)
    status, out, _ = command(evaluation, "shufflenet_v2_x0_5", "--predict", files[0])
    assert status == 0 and out.splitlines()[1].endswith("%  tench") and len(out.splitlines()) == 6


@pytest.mark.parametrize("files, culprit", [
    (["missing.png"], "missing.png"), (["notes.txt"], "notes.txt"), (["."], "."),
    ([], "--predict")])
def test_predict_names_what_is_no_image(color_teacher, command, files, culprit):
    open("notes.txt", "w").write("hello")
    status, _, err = command(evaluation, color_teacher, "--predict", *files)
    assert status == 2 and culprit in err and err.count("\n") == 1
    torch.save(create_model("resnet8", 3).state_dict(), "bare.pt")
    status, _, err = command(evaluation, "bare.pt", "--predict", "x.png")
    assert status == 2 and err.startswith("eval.py: bare.pt: does not say which network")
