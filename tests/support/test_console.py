"""What a run prints reaches whatever reads it: a console of any encoding, a file, a pipe."""
import io
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

import data
import eval as evaluation
import train
from support import console

# One in no European encoding, one that is no text at all, as a file system may have it.
CLASSES = ["猫", "caf\udce9", "±"]
CE = ("--method", "ce", "--dataset", "folder", "--image-size", 16, "--student", "resnet8",
      "--epochs", 2, "--device", "cpu")


@pytest.fixture
def printed(command, monkeypatch):
    """printed(encoding, script, *arguments): what it writes to a console of that encoding."""
    def run(encoding, *arguments):
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", out)
        status, _, err = command(*arguments)
        assert status == 0, err
        out.flush()
        return out.buffer.getvalue()
    return run


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_names_in_any_script(printed, colors, color_teacher, write_run, encoding):
    torch.save(torch.load(color_teacher, weights_only=True) | dict(classes=CLASSES), "cats.pt")
    shutil.copy(colors / "val/red/0.png", "犬.png")
    out = printed(encoding, evaluation, "cats.pt", "--predict", "犬.png")
    for name in ("犬", "猫", "±", "caf\udce9"):
        assert name.encode(encoding, "backslashreplace") in out
    # The signs of our own: a table's, and those of --help.
    for seed in (0, 1):
        write_run(Path(f"t/row/seed{seed}"), [40 + seed], seed=seed)
    assert "40.50 ± 0.71".encode(encoding, "backslashreplace") in printed(
        encoding, evaluation, "--table", "t")
    assert b"--predict IMAGE" in printed(encoding, evaluation, "--help")


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_run_on_a_folder_in_any_script(printed, colors, encoding):
    shutil.copytree(colors, "猫")
    out = printed(encoding, train, *CE, "--data-dir", "猫")
    assert rb"run folder runs/\u732b-ce-resnet8" in out.replace(b"\\", b"/").replace(b"/u", b"\\u")


@pytest.fixture
def pipe(monkeypatch):
    """pipe() makes standard output a pipe, and returns the end to read from."""
    ends = []

    def make():
        read, write = os.pipe()
        ends.append(open(write, "w", encoding="utf-8"))
        monkeypatch.setattr(sys, "stdout", ends[0])
        return read
    yield make
    # Nothing is left in it that Python would complain of at its end.
    ends[0].close()


def test_a_pipe_that_nobody_reads(command, pipe, write_run):
    os.close(pipe())
    write_run(Path("t/row/seed0"), [40])
    assert command(evaluation, "--table", "t") == (141, "", "")


def test_a_reader_that_leaves_during_a_run(command, pipe, colors, monkeypatch):
    read = pipe()
    with monkeypatch.context() as patch:
        patch.setattr(console, "epoch_line", lambda *about: os.close(read) or "1")
        status, _, err = command(train, *CE, "--data-dir", colors, "--run-dir", "run")
    assert (status, err) == (141, "")
    # What is saved goes on.
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert len(train.run(train.Settings(), "run", resume=True)) == 2


def test_a_file_shows_what_is_printed_at_once(command, colors, monkeypatch):
    real, seen = train.train_epoch, []

    def train_epoch(*about):
        seen.append(Path("out").read_text())
        return real(*about)
    monkeypatch.setattr(train, "train_epoch", train_epoch)
    monkeypatch.setattr(sys, "stdout", open("out", "w"))
    assert command(train, *CE, "--data-dir", colors)[0] == 0
    first, second = seen
    assert "minimise  CE(label)" in first and second.splitlines()[-1].startswith("    1 ")


def test_the_other_processes_end_without_a_word_where_the_first_has_said_it(command, monkeypatch):
    """torchrun ends them while they wait for it."""
    def ended(seconds):
        if seconds:
            raise KeyboardInterrupt
    monkeypatch.setattr(console.time, "sleep", ended)
    flags = "--dataset", "folder", "--data-dir", "nowhere"
    monkeypatch.setenv("RANK", "1")
    assert command(train, *flags) == (130, "", "")
    monkeypatch.setenv("RANK", "0")
    status, _, err = command(train, *flags)
    assert status == 2 and "--data-dir nowhere: no such folder" in err


@pytest.fixture
def clock(monkeypatch):
    """clock(seconds) puts the time of `progress` forward."""
    now = [0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])

    def forward(seconds):
        now[0] += seconds
    return forward


def test_a_line_every_thirty_seconds(clock, capsys):
    for _ in console.progress(range(10), 10, "epoch 1 of 3, step", 3):
        clock(20)
    # After 40 s two of thirty steps are done, after 160 s eight.
    assert capsys.readouterr().out.splitlines() == [
        f"epoch 1 of 3, step {done} of 10, about {minutes} min to go"
        for done, minutes in ((2, 9), (4, 9), (6, 8), (8, 7))]
    for _ in console.progress(range(2), 2, "image", 100):
        clock(200)
    assert capsys.readouterr().out == "image 1 of 2, about 11 h 3 min to go\n"
    for _ in console.progress(range(100), 100, "image"):
        clock(0.29)
    assert capsys.readouterr().out == ""


def test_on_a_terminal_there_is_tqdms_bar(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for _ in console.progress(range(10), 10, "epoch 1 of 3, step", 3):
        clock(20)
    assert capsys.readouterr().out == ""


def test_whatever_takes_long_shows_how_far_it_is(command, colors, monkeypatch):
    times = iter(range(0, 10 ** 9, 31))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(times))
    status, out, err = command(train, *CE, "--data-dir", colors, "--batch-size", 30)
    assert status == 0, err
    for line in ("image 1 of 120, about ", "epoch 1 of 2, step 3 of 4, about ",
                 "epoch 2 of 2, step 1 of 4, about "):
        assert line in out


def test_a_long_measurement_shows_how_far_it_is(clock, capsys):
    class Slow(torch.nn.Linear):
        def forward(self, x):
            clock(40)
            return super().forward(x.mean((2, 3)))
    images = torch.zeros(6, 3, 8, 8, dtype=torch.uint8)
    evaluation.predict(Slow(3, 2), images, (.5, .5, .5), (.5, .5, .5), batch_size=2)
    assert capsys.readouterr().out.splitlines() == ["measured, batch 1 of 3, about 1 min to go",
                                                    "measured, batch 2 of 3, about 1 min to go"]


@pytest.mark.parametrize("n, settings, words", [
    # 30 steps with which a network learnt nothing, and 360 that brought it to 96 %.
    (186, dict(epochs=10, batch_size=64), "only 30 steps in all; if it learns little, try "
     "--batch-size 16 --epochs 25"),
    (2022, dict(epochs=10, batch_size=64), ""), (12, dict(epochs=90, batch_size=4), ""),
    (12, dict(epochs=9, batch_size=4), "only 27 steps in all; if it learns little, try "
     "--batch-size 4 --epochs 100")])
def test_too_few_steps_are_said(n, settings, words):
    s = train.resolve(train.Settings(method="ce", dataset="folder", **settings))
    part = torch.zeros(n, 3, 1, 1), torch.zeros(n)
    assert console.more_steps(s, data.Dataset(part, part, ["a", "b"], (), (), False)) == words
