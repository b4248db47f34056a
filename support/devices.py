"""Where the tensors live: the device, its precision, the order in which it likes an image's
numbers, and what is worth knowing about the machine."""
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch
import torchvision

from support.errors import UserError


def pick_device(name):
    """The torch.device of that name: "cpu", "cuda", "mps", or "auto" for the fastest one here.

    Also tells cuDNN to keep float32 at its full precision and to give the same result twice.
    Raises UserError where this machine has no such device.
    """
    available = dict(cpu=True, cuda=torch.cuda.is_available(),
                     mps=torch.backends.mps.is_available())
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    if not available[name]:
        raise UserError(f"--device {name}: not available here; leave the flag out or give cpu")
    # By default CUDA rounds the inputs of float32 convolutions to TF32, which keeps 10 bits, and
    # chooses algorithms that differ from run to run.
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
    return torch.device(name)


def layout(device):
    """The memory format of images and weights: channels_last, which convolutions are fastest with.

    Not on MPS: there the backward pass of batch norm in channels_last is wrong, or raises, in many
    versions of torch (pytorch/pytorch#175189).
    """
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def keep_on(device, data):
    """Move a Dataset to the device, but not photographs: they may be larger than its memory, and go
    there batch by batch."""
    if data.area is None:
        data.train, data.test = (tuple(t.to(device) for t in p) for p in (data.train, data.test))


def amp_by_default(device):
    """Any GPU gains from mixed precision. On processors that have bfloat16 instructions the small
    networks of glyphs are slower with it (1.1 times on an AMD EPYC, 1.6 times on an Intel Xeon)."""
    return device.type == "cuda"


def mixed_precision(device, on):
    """(autocast, GradScaler): bfloat16, which needs no scaler; on a GPU without it float16, whose
    small gradients the scaler keeps from underflow."""
    older = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.float16 if older else torch.bfloat16
    scaler = torch.amp.GradScaler(device.type, enabled=on and dtype == torch.float16)
    return torch.autocast(device.type, dtype, enabled=on), scaler


def memory_is_full(error):
    """Whether that is why a device, or Python, raised this error. It has a type of its own only
    where PyTorch itself keeps a GPU's memory: not on MPS, nor while another program fills a GPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or bool(
        re.search("out of memory|allocate memory|ALLOC_FAILED", str(error)))


def environment(device):
    """Where a run was made: versions, processor or GPU, threads, commit and command."""
    # The full hash, and -dirty where the files differ from it.
    describe = "git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"
    try:
        commit = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        # No git here.
        commit = None
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    if not name and Path("/proc/cpuinfo").exists():
        # Linux leaves platform.processor() empty.
        name = re.search(r"model name\s*: (.*)|$", Path("/proc/cpuinfo").read_text())[1]
    return dict(python=platform.python_version(), torch=torch.__version__,
                torchvision=torchvision.__version__, system=platform.system(),
                machine=platform.machine(), device=device.type, device_name=name,
                cpu_capability=torch.backends.cpu.get_cpu_capability(),
                threads=torch.get_num_threads(), commit=commit and commit.stdout.strip() or None,
                command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]))
