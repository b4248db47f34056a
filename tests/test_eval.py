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
        right1, right5, nll = right1 + (order[0] == label), right5 + (label in order[:5]), nll - math.log(p[label])
        cell = bins[min(14, math.ceil(max(p) * 15) - 1)]
        cell[0], cell[1], cell[2] = cell[0] + 1, cell[1] + max(p), cell[2] + (order[0] == label)
    ece = sum(abs(confidence - right) for _, confidence, right in bins) / 300
    assert report == pytest.approx(dict(top1=right1 / 3, top5=right5 / 3, nll=nll / 300, ece=100 * ece, n=300))


def test_top5_of_fewer_classes_is_everything():
    assert evaluation.measure(torch.randn(20, 3), torch.randint(3, (20,)))["top5"] == 100


def test_inheritance_counts():
    teacher, student = torch.eye(3)[[0, 1, 2, 2, 2]], torch.eye(3)[[0, 1, 2, 0, 1]]
    report = evaluation.inheritance(student, teacher, torch.tensor([0, 2, 1, 0, 0]))
    assert report == {"teacher_top1": 20, "agreement": pytest.approx(60), "teacher_errors": 4, "teacher_errors_made": 2, "teacher_errors_avoided": 1}


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}],
                         ids=["bare", "model", "state_dict with module."])
def test_the_fields_checkpoint_forms_load(tmp_path, wrap):
    source = create_model("resnet8", 5)
    torch.save(wrap(source.state_dict()), tmp_path / "x.pt")
    loaded, _ = evaluation.load_model(tmp_path / "x.pt", "resnet8")
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in loaded.state_dict().items()) and not loaded.training


def test_a_foreign_checkpoint_is_measured_like_our_own(colors, color_teacher, tmp_path, command):
    torch.save(torch.load(color_teacher, weights_only=True)["model"], tmp_path / "bare.pt")
    own = json.loads(command(evaluation, color_teacher, "--json")[1])
    status, out, err = command(evaluation, color_teacher, "--teacher-checkpoint", color_teacher, "--json")
    assert status == 0 and json.loads(out)["agreement"] == 100 and json.loads(out)["teacher_errors_avoided"] == 0
    assert set(own) == {"top1", "top5", "nll", "ece", "n"} and own["n"] == 60
    status, out, err = command(evaluation, color_teacher)
    assert status == 0 and f"{own['top1']:.4f}" in out


def write_run(folder, accuracies, **config):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(student="resnet8") | config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(dict(epoch=i, test_top1=a)) + "\n" for i, a in enumerate(accuracies, 1)))


def test_the_table_is_computed_from_the_logs(tmp_path, command):
    write_run(tmp_path / "kd/seed0", [50, 70, 60])
    write_run(tmp_path / "kd/seed1", [50, 55, 64])
    write_run(tmp_path / "ce/seed0", [10, 40])
    status, out, _ = command(evaluation, "--table", tmp_path)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()]
    assert status == 0 and rows[2:] == [["ce", "resnet8", "2", "1", "40.00", "40.00"], ["kd", "resnet8", "3", "2", "62.00 ± 2.83", "67.00"]]


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


def test_the_table_refuses_to_mix_experiments(tmp_path, command):
    write_run(tmp_path / "kd/seed0", [50, 70], lr=0.05, seed=0)
    write_run(tmp_path / "kd/seed1", [50, 55], lr=0.025, seed=1)
    status, _, err = command(evaluation, "--table", tmp_path)
    assert status == 2 and "mixes" in err and "kd" in err
