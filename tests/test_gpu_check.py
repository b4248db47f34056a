"""The acceptance script for a GPU: what of it runs on a CPU, and that it can fail."""
import os
import subprocess
import sys
import tempfile

import benchmark
import gpu_check
import pytest
from conftest import ROOT

from support import glyphs


@pytest.mark.slow
def test_all_that_can_run_on_a_cpu():
    done = subprocess.run([sys.executable, ROOT / "tests/gpu_check.py", "--device", "cpu"],
                          capture_output=True, text=True, timeout=900,
                          env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stdout + done.stderr
    checks = {line.split()[0] for line in done.stdout.splitlines() if " ok " in line}
    assert checks == {"default_run", "precision", "objectives", "views", "photographs",
                      "kill_and_resume", "several_processes", "together_py"}


@pytest.mark.parametrize("first, words", [
    (("a value", False, "1 apart"), "FAILED  1 apart"), (None, "FAILED  division by zero")])
def test_a_check_that_fails(command, monkeypatch, tmp_path, first, words):
    def broken(device):
        yield first or 1 / 0
    monkeypatch.setattr(gpu_check, "CHECKS", [broken])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # So that what the script makes small has its size again.
    for module, name in ((glyphs, "N_TRAIN"), (glyphs, "N_TEST"), (benchmark, "DEVICE")):
        monkeypatch.setattr(module, name, getattr(module, name))
    status, out, _ = command(gpu_check, "--device", "cpu")
    assert str(status).startswith("what was printed on the way") and words in out
    assert "1 failed" in out
