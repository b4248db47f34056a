"""The acceptance script for a GPU: what of it runs on a CPU, and that it can fail."""
import os
import subprocess
import sys

import pytest
from conftest import ROOT


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
def test_a_check_that_fails(tmp_path, first, words):
    """In a process of its own, since it makes the data sets small."""
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import gpu_check\n"
            f"def broken(device):\n    yield {first} or 1 / 0\n"
            "sys.argv = ['gpu_check.py', '--device', 'cpu']\n"
            "gpu_check.CHECKS = [broken]\ngpu_check.main()")
    done = subprocess.run([sys.executable, "-c", code, ROOT / "tests"], capture_output=True,
                          text=True, env=os.environ | dict(TMPDIR=str(tmp_path)))
    assert done.returncode == 1 and words in done.stdout and "1 failed" in done.stdout, done.stderr
