"""The objectives of one view: pure functions of logits, labels and plain numbers.

z_s, z_t: (B, C) raw logits of student and teacher; y: (B,) int64 labels; p_T(z) = softmax(z / T).
Each objective returns a dict of named scalars, already weighted, whose sum is to be minimised; with
two views, (S6) adds up the terms of both. Half-precision logits are taken to float32 first, float64
stays float64; other shapes raise ValueError. The tags (S1)-(S6) are this project's own: README,
"The method on one screen".
"""
import math

import torch
import torch.nn.functional as F

from swap import add_to_target, check, swap


def _full(logits):
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _ce(z_s, target):
    """Cross-entropy, batch mean. A label of -100 raises like any other that is no class."""
    return F.cross_entropy(z_s, target, ignore_index=-2 ** 63)


def _soften(z_s, z_t, temperatures):
    """T (K, 1, 1) and log p_T (K, B, C) of both, all K temperatures in one computation. T is filled
    on the device, since a copy from the host would make the GPU wait at every step."""
    if not temperatures or not all(0 < t < math.inf for t in temperatures):
        raise ValueError(f"temperatures must be finite and above 0, at least one: {temperatures}")
    T = torch.cat([z_s.new_full((1, 1, 1), t) for t in temperatures])
    return T, F.log_softmax(z_s / T, -1), F.log_softmax(z_t / T, -1)


def _kl(T, log_p_s, log_p_t):
    """(S2), summed over the temperatures:  sum over T of  T^2 * KL( p_T(z_t) || p_T(z_s) )."""
    kl_T = F.kl_div(log_p_s, log_p_t, reduction="none", log_target=True).sum(-1)  # (K, B)
    return (T[:, 0].square() * kl_T).sum() / log_p_s.shape[1]


def _margin(T, log_p_s, z_s, target, detach):
    """(S4)  L_SS = sum over T of  T^2 * KL( p_T(swap(z_s, y)) || p_T(z_s) ),  in closed form.

    The swap changes two classes only: with d = z_m - z_y >= 0 and p = p_T(z_s),
        T^2 * KL = T * (p_m - p_y) * d,
    a margin penalty on the student's own mistakes, zero, value and gradient, where it is right.
    F.kl_div with a target that carries gradient is NaN once a probability underflows; this is not.
    """
    y, m = target[:, None], z_s.argmax(1, keepdim=True)                  # (B, 1) each
    d = z_s.gather(1, m) - z_s.gather(1, y)                              # (B, 1)
    p_m, p_y = (log_p_s.gather(-1, c.expand(len(T), -1, -1)).exp() for c in (m, y))  # (K, B, 1)
    gap = p_m - p_y
    return (T * (gap.detach() if detach else gap) * d).sum() / len(z_s)


def _against_rest(log_p, c):
    """(log p_c, log(1 - p_c)) of one class c (B, 1) of each row: (1, B, 2). The second is a
    logsumexp over the other classes, since the log of a difference is -inf once p_c rounds to 1."""
    lowest = torch.finfo(log_p.dtype).min
    rest = log_p.scatter(-1, c[None], lowest).logsumexp(-1, keepdim=True)            # (1, B, 1)
    return torch.cat([log_p.gather(-1, c[None]), rest], -1)


def _among(logits, T, hidden):
    """log p_T (1, B, C) over the classes that are not `hidden` (B, C). The lowest number, not -inf,
    stands for a hidden one: a KL is then 0 there, and in a row with all hidden, not NaN."""
    lowest = torch.finfo(logits.dtype).min
    return F.log_softmax((logits / T).masked_fill(hidden, lowest), -1)


def standardize(logits):
    """z <- (z - mean) / (1e-7 + std), row by row, std with C - 1:  (B, C) -> (B, C).

    Source: Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024.
    The student need not match the teacher's shift and scale: a z + b with a > 0 gives the same. A
    swap permutes a row, so mean and std stay: standardize(swap(z, y)) = swap(standardize(z), y).
    """
    check(None, logits)
    z = _full(logits)
    # std_mean is exact on a constant row, which mean() misses by a rounding.
    std, mean = torch.std_mean(z, 1, keepdim=True)                       # (B, 1) each
    # A constant row is 0 over anything; over 1e-7 its gradient would grow 1e7 times, so over 1.
    return (z - mean) / (1e-7 + std.masked_fill(std == 0, 1))


# In kd, dkd and sld a keyword of the same name hides the function.
_standardize = standardize


def kl(student_logits, teacher_logits, temperature):
    """(S2)  T^2 * KL( p_T(z_t) || p_T(z_s) ), summed over classes, batch mean: a scalar.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015.

    - log_softmax on both sides, never log(softmax), which is -inf once a probability underflows.
    - Summed over classes ("batchmean"): the mean over all elements would be C times too small.
    - T^2, because the gradient of the KL shrinks with 1/T^2; so each temperature has a like say.
    - Gradient reaches whichever side requires it. A frozen teacher's logits do not.
    """
    check(None, student_logits, teacher_logits)
    return _kl(*_soften(_full(student_logits), _full(teacher_logits), (temperature,)))


def ce(student_logits, target):
    """{"ce"}: cross-entropy with the label, batch mean."""
    check(target, student_logits)
    return {"ce": _ce(_full(student_logits), target)}


def kd(student_logits, teacher_logits, target, *, temperatures=(4.0,), ce_weight=0.1, kd_weight=0.9,
       standardize=False):
    """{"ce", "teacher"}: plain KD,  a * CE + b * sum over T of (S2).  The KL never sees the label.

    standardize: both sides of the KL are standardized before the temperature; CE sees raw logits.
    """
    check(target, student_logits, teacher_logits)
    z_s, z_t = _full(student_logits), _full(teacher_logits)
    x_s, x_t = (_standardize(z_s), _standardize(z_t)) if standardize else (z_s, z_t)
    return {"ce": ce_weight * _ce(z_s, target),
            "teacher": kd_weight * _kl(*_soften(x_s, x_t, temperatures))}


def dkd(student_logits, teacher_logits, target, *, epoch, warmup=20, alpha=1.0, beta=8.0,
        temperature=4.0, ce_weight=1.0, standardize=False):
    """{"ce", "teacher"}: Decoupled KD,  a * CE + min(epoch / warmup, 1) * (alpha TCKD + beta NCKD),

        TCKD = T^2 * KL( (p_y, 1 - p_y) of the teacher || the same of the student ),  p = p_T(z),
        NCKD = T^2 * KL of the two softmaxes over the other classes only.

    Source: Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022; beta 2 to 8 by network.
    KD is TCKD + (1 - p_y) * NCKD with the teacher's p_y: the surer it is, the less NCKD counts.
    epoch: counts from 1. warmup: epochs until the full weight, 1 for none; 0 raises, and so does a
    label outside 0..C-1. ce_weight: a. standardize: as in kd.
    """
    check(target, student_logits, teacher_logits)
    z_s, z_t = _full(student_logits), _full(teacher_logits)
    x_s, x_t = (_standardize(z_s), _standardize(z_t)) if standardize else (z_s, z_t)
    label = target[:, None]                                              # (B, 1)
    T, log_p_s, log_p_t = _soften(x_s, x_t, (temperature,))
    tckd = _kl(T, _against_rest(log_p_s, label), _against_rest(log_p_t, label))
    hidden = torch.zeros_like(z_s, dtype=torch.bool).scatter(1, label, True)
    nckd = _kl(T, _among(x_s, T, hidden), _among(x_t, T, hidden))
    return {"ce": ce_weight * _ce(z_s, target),
            "teacher": min(epoch / warmup, 1) * (alpha * tckd + beta * nckd)}


def rld(student_logits, teacher_logits, target, *, epoch, warmup=20, alpha=1.0, beta=8.0,
        temperature=4.0, ce_weight=1.0, alpha_temperature=1.0):
    """{"ce", "teacher"}: Refined LD,  a * CE + min(epoch / warmup, 1) * (alpha SCD + beta MCD),

        SCD = T_a^2 * KL( (p_m, 1 - p_m) of the teacher || (p_y, 1 - p_y) of the student ),
        MCD = T^2 * KL of the two softmaxes over the classes whose teacher logit is below z_t[y],
    with m the teacher's top class and p = p_T(z) at T_a = alpha_temperature.

    Source: Sun et al., "Knowledge Distillation with Refined Logits", 2024.
    The teacher says how sure to be, the label of what. A row with no class below it has MCD = 0.
    epoch, warmup, ce_weight: as in dkd. A label outside 0..C-1 raises.
    """
    check(target, student_logits, teacher_logits)
    z_s, z_t = _full(student_logits), _full(teacher_logits)
    label, top = target[:, None], z_t.argmax(1, keepdim=True)            # (B, 1) each
    T_a, log_p_s, log_p_t = _soften(z_s, z_t, (alpha_temperature,))
    scd = _kl(T_a, _against_rest(log_p_s, label), _against_rest(log_p_t, top))
    T, hidden = z_t.new_full((1, 1, 1), temperature), z_t >= z_t.gather(1, label)    # hidden (B, C)
    mcd = _kl(T, _among(z_s, T, hidden), _among(z_t, T, hidden))
    return {"ce": ce_weight * _ce(z_s, target),
            "teacher": min(epoch / warmup, 1) * (alpha * scd + beta * mcd)}


def sld(student_logits, teacher_logits, target, *, epoch, gamma=150,
        temperatures=(1, 2, 3, 4, 5, 6), ce_weight=0.1, kd_weight=0.9, teacher_fix="swap",
        student_swap=True, detach=False, omega=None, standardize=False):
    """{"ce", "teacher", "student"}: Swapped Logit Distillation, (S6) for one view,
        a * CE + b * ( L_TS + 1[epoch > gamma] * L_SS ).

    epoch: counts from 1. gamma: the last epoch without L_SS; until then "student" is absent.
    temperatures: the K values of T. ce_weight, kd_weight: a and b.
    teacher_fix: "swap" is (S3); "add" puts GA with `omega` in its place; "none" changes nothing.
    student_swap=False drops L_SS. detach: False, as released, lets gradient through the
    pseudo-teacher too; True leaves +-T (p_m - p_y) on the two swapped classes and no more.
    standardize: as in kd, after the fix.
    Raises ValueError for another teacher_fix, or "add" without omega; a label outside 0..C-1 too.
    """
    check(target, student_logits, teacher_logits)
    z_s, z_t = _full(student_logits), _full(teacher_logits)

    # (S3)  L_TS = sum over T of  kl(z_s, swap(z_t, y), T)
    if teacher_fix == "swap":
        z_t = swap(z_t, target)
    elif teacher_fix == "add":
        if omega is None:
            raise ValueError("teacher_fix='add' needs omega, the amount added to the label's logit")
        z_t = add_to_target(z_t, target, omega)
    elif teacher_fix != "none":
        raise ValueError(f"teacher_fix must be 'swap', 'add' or 'none', not {teacher_fix!r}")
    # After the swap. So it is for the pseudo-teacher as well, since swap and standardize commute.
    x_s, x_t = (_standardize(z_s), _standardize(z_t)) if standardize else (z_s, z_t)
    T, log_p_s, log_p_t = _soften(x_s, x_t, temperatures)
    terms = {"ce": ce_weight * _ce(z_s, target),
             "teacher": kd_weight * _kl(T, log_p_s, log_p_t)}

    # (S5)  early on the student's own predictions contradict the teacher, so L_SS waits for gamma
    if student_swap and epoch > gamma:
        terms["student"] = kd_weight * _margin(T, log_p_s, x_s, target, detach)
    return terms


# What train.py's --method names.
OBJECTIVES = {"ce": ce, "kd": kd, "sld": sld, "dkd": dkd, "rld": rld}
