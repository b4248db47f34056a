"""results/run.py: its rows are experiments that train.py takes, and sharing a teacher's logits
changes no digit."""
import importlib.util
from pathlib import Path

import pytest

import train

SPEC = importlib.util.spec_from_file_location(
    "results_run", Path(__file__).parent.parent / "results/run.py")
runner = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(runner)


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
    # What is tuned is measured on validation images, by a teacher that does not know them either.
    for s in settings.values():
        if group.startswith("tuning"):
            assert s["evaluate"] == "val" and "-val/" in (s["teacher_checkpoint"] or "-val/")


def test_rows_of_a_family_share_their_rate():
    rates = {}
    for row, flags in runner.GROUPS["glyphs"][0].items():
        words = flags.split()
        assert words.count("--lr") == 1
        rates.setdefault(runner.family(runner.LADDER[row]), set()).add(
            words[words.index("--lr") + 1])
    assert {name: len(rate) for name, rate in rates.items()} == dict.fromkeys(
        ("ce", "kd", "sld", "dkd", "rld"), 1)
    assert runner.family(runner.SIX) == "sld" and runner.family(runner.LADDER["04-kd-both"]) == "kd"


def test_shared_logits_change_no_digit(short, monkeypatch):
    def numbers(history):
        return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")}
                for row in history]

    alone = numbers(train.run(short(epochs=2), "alone"))
    own = train.get_teacher

    def get_teacher(*args):
        teacher, digest = own(*args)
        if Path("logits").exists():
            # A second row computes nothing.
            teacher.forward = None
        return runner.shared(teacher, Path("logits")), digest
    monkeypatch.setattr(train, "get_teacher", get_teacher)
    assert numbers(train.run(short(epochs=2), "first")) == alone
    files = sorted(Path("logits").iterdir())
    assert files and numbers(train.run(short(epochs=2), "second")) == alone
    assert sorted(Path("logits").iterdir()) == files
