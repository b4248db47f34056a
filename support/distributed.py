"""Several processes of one run, as torchrun starts them."""
import contextlib
import io
import os
import sys
import warnings

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from support.errors import UserError


def process():
    """(number of this process, number of all); (0, 1) except under torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def several_processes(device):
    """Under torchrun: this process joins the others, with a GPU of its own where there are any.
    Only the first one prints. On CPUs the process ends with the block. device: the flag, or
    None."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    gpu = torch.cuda.is_available() and device != "cpu"
    if gpu:
        if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            raise UserError(f"--nproc-per-node: there are {torch.cuda.device_count()} GPUs here; "
                            "start as many processes, or give --device cpu")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpu else "gloo", device_id=(
        torch.device("cuda", torch.cuda.current_device()) if gpu else None))
    try:
        quiet = io.StringIO() if dist.get_rank() else sys.stdout
        with contextlib.redirect_stdout(quiet):
            yield
        # gloo in torch 2.6 can hang on shutdown if rank 0 exits first. Where a process failed it
        # says so itself.
        with contextlib.suppress(RuntimeError):
            dist.barrier()
    except BaseException:
        # The others wait for this one's gradients, and nccl's clean-up would wait for the others
        # (pytorch/torchtitan#1342). Without it this process ends, and torchrun then ends them.
        if not gpu:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()
    if not gpu:
        # All is saved and said. A thread of gloo that is still there when the interpreter ends may
        # abort this process ("terminate called without an active exception", once in some hundred
        # runs), which torchrun would call a failed run.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def by_the_first(choose):
    """choose(), which looks at files, as the first process of all sees them once all are here. A
    UserError that it raises is raised in every process."""
    rank, world = process()
    if world == 1:
        return choose()
    dist.barrier()
    found = [None]
    if rank == 0:
        try:
            found = [choose()]
        except UserError as error:
            found = [error]
    dist.broadcast_object_list(found)
    if isinstance(found[0], UserError):
        raise found[0]
    return found[0]


def in_parallel(student):
    """The student, under torchrun as DistributedDataParallel, which averages the gradients. Each
    process keeps batch norm's statistics of its own rows; those of the first are saved."""
    if process()[1] == 1:
        return student
    # Of a 1x1 convolution, whose strides mean the same in either layout (pytorch/pytorch#157862).
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    # The warning is of the keyword's new name, which older versions do not know.
    with warnings.catch_warnings(action="ignore"):
        return DistributedDataParallel(student, broadcast_buffers=False)


def over_processes(numbers, device):
    """The sums of a list of numbers over all processes."""
    if process()[1] == 1:
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def device_of_group():
    """The name of the device that the processes of this run work on."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"
