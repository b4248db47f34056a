"""The idea of the paper, alone: when a prediction is wrong, exchange its top logit with the
label's. Below it, two other repairs that it is compared with.

Source: Limantoro et al., "Swapped Logit Distillation via Bi-level Teacher Alignment", 2025.
logits: (B, C), any float dtype, C >= 2. target: (B,) int64 class indices, 0 <= target < C; an index
outside raises from `gather` or `scatter`, other shapes raise ValueError. All functions are
differentiable and leave their inputs as they were.
"""


def check(target, *logits):
    """Raises ValueError unless each of `logits` is (B, C) with B >= 1 and C >= 2, and target (B,).

    It looks at shapes only: at the values of labels a GPU would have to wait.
    """
    shapes = [tuple(z.shape) for z in logits]
    B, *C = shapes[0] or (0,)
    right = B >= 1 and len(C) == 1 and C[0] >= 2 and set(shapes) == {(B, *C)}
    if not right or target is not None and tuple(target.shape) != (B,):
        labels = "" if target is None else f", labels {tuple(target.shape)}"
        raise ValueError(f"needs logits (B, C), at least (1, 2), and labels (B,), not logits "
                         f"{', '.join(map(str, shapes))}{labels}")


def swap(logits, target):
    """(S1)  m = argmax_c z_c;  where m != y, exchange z_m and z_y.  Returns (B, C).

    >>> swap(tensor([[2., 9., 5.]]), tensor([2]))     # cat, otter, beaver; the label is beaver
    tensor([[2., 5., 9.]])                            # beaver and otter changed places, cat stayed

    A row is only permuted: the label ends largest, every other class keeps its probability, a row
    that is already right stays, and swapping before or after softmax at any temperature is the
    same.
    """
    check(target, logits)
    label = target[:, None]                                   # (B, 1)
    top = logits.argmax(1, keepdim=True)                      # (B, 1)
    z_y, z_m = logits.gather(1, label), logits.gather(1, top)
    return logits.scatter(1, top, z_y).scatter(1, label, z_m)


def sort_to_target(logits, target):
    """The authors' next step:  the label gets the row's largest logit, and every class that was
    above it moves down one rank.  Returns (B, C).

    Source: Limantoro et al., "Parameter-Free Logit Distillation via Sorting", IEEE Signal
    Processing Letters 2025.

    >>> sort_to_target(tensor([[9., 7., 2., 5.]]), tensor([3]))
    tensor([[7., 5., 2., 9.]])    # a swap gives [[5., 7., 2., 9.]]: the first falls to third

    A row is only permuted, and all classes but the label keep their order. Where the label is
    second, this is the swap.
    """
    check(target, logits)
    # All classes by rank, the label put first. They get the row's values, largest first.
    front = logits.scatter(1, target[:, None], float("inf"))
    order = front.sort(dim=1, descending=True, stable=True).indices     # (B, C)
    return logits.scatter(1, order, logits.sort(dim=1, descending=True, stable=True).values)


def add_to_target(logits, target, omega):
    """Ground-truth Addition (GA), the alternative that the paper rejects:  z_y += omega, on every
    row.

    omega: logit units. It changes every probability of the row, and no one knows its natural size.
    Returns (B, C).
    """
    check(target, logits)
    label = target[:, None]
    return logits.scatter(1, label, logits.gather(1, label) + omega)


def misclassified(logits, target):
    """(B,) bool: the label's logit is below the row's maximum, so a swap changes it. A tie is
    right."""
    check(target, logits)
    return logits.gather(1, target[:, None])[:, 0] < logits.amax(1)
