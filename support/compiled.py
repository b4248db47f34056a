"""Networks through torch.compile, which joins many small operations into few. It takes a minute or
more before the first step, so it pays in long runs only."""
import dataclasses

import torch

from support.errors import UserError


def compiled(learner):
    """The train.Learner with its student and its teacher compiled. They share the weights of the
    plain networks, and `student`, which is saved and evaluated, stays the plain one. Raises
    UserError at the first step where torch.compile cannot do it."""
    both = (network and _compiled(network) for network in (learner.parallel, learner.teacher))
    return dataclasses.replace(learner, **dict(zip(("parallel", "teacher"), both)))


def _compiled(network):
    """f(images) -> logits, compiled for the shape (B, 3, S, S) of the first images it is given."""
    quick, shapes = torch.compile(network, dynamic=False), []

    def forward(images):
        if shapes:
            # An epoch's tail would take as long to compile as everything else.
            return (quick if images.shape == shapes[0] else network)(images)
        shapes.append(images.shape)
        try:
            return quick(images)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # No compiler, or an operation that it does not know; what follows is advice on logs.
            reason = " ".join(str(error).split("\n\n")[0].split())
            raise UserError(f"--compile: torch.compile does not work here ({reason}); leave it out")
    return forward
