"""Where the tensors live: the device, and the order in which it likes an image's numbers."""
import torch

from folders import UserError


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
