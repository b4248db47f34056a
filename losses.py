"""The objectives of one view: pure functions of logits, labels and plain numbers.

z_s, z_t: (B, C) raw logits of student and teacher; y: (B,) int64 labels; p_T(z) = softmax(z / T).
Each objective returns a dict of named scalars, already weighted, whose sum is to be minimised; with
two views, (S6) adds up the terms of both. Half-precision logits are taken to float32 first, float64
stays float64. Other shapes raise ValueError, labels outside 0..C-1 what the indexing raises. The
tags (S1)-(S6) are this project's own: README, "The method on one screen".
"""
import math

import torch
import torch.nn.functional as F

from swap import add_to_target, check, misclassified, sort_to_target, swap


def kl(student_logits, teacher_logits, temperature):
    """(S2)  T^2 * KL( p_T(z_t) || p_T(z_s) ), summed over classes, batch mean: a scalar.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015.

    - Both sides are log_softmax. log(softmax) would be -inf once a probability underflows.
    - Summed over classes ("batchmean"): the mean over all elements would be C times too small.
    - The gradient of the KL shrinks with 1/T^2; the factor T^2 lets each temperature count alike.
    - Gradient reaches whichever side requires it. A frozen teacher's logits do not.
    """
    check(None, student_logits, teacher_logits)
    return _kl(*_soften(_float32(student_logits), _float32(teacher_logits), (temperature,)))


def ce(student_logits, target):
    """{"ce"}: cross-entropy with the label, batch mean."""
    check(target, student_logits)
    return {"ce": _ce(_float32(student_logits), target)}


def kd(student_logits, teacher_logits, target, *, temperatures=(4.0,), ce_weight=0.1, kd_weight=0.9,
       standardize=False):
    """{"ce", "teacher"}: plain KD,  a * CE + b * sum over T of (S2).  The KL never sees the label.

    ce_weight, kd_weight: a and b. standardize: whether the KL sees both sides standardized, before
    the temperature; CE sees raw logits. Raises ValueError for a temperature that is not above 0.
    """
    check(target, student_logits, teacher_logits)
    z_s, z_t = _float32(student_logits), _float32(teacher_logits)
    x_s, x_t = _standardized_if(standardize, z_s, z_t)
    return {"ce": ce_weight * _ce(z_s, target),
            "teacher": kd_weight * _kl(*_soften(x_s, x_t, temperatures))}


# sld's teacher_fix: what becomes of the teacher's logits z_t (B, C), with the labels y and omega.
TEACHER_FIXES = {
    "swap": lambda z_t, y, omega: swap(z_t, y),               # (S3)
    "sort": lambda z_t, y, omega: sort_to_target(z_t, y),     # the label moves to the first rank
    "mask": lambda z_t, y, omega: z_t,       # but sld leaves out the KL where the teacher is wrong
    "add": add_to_target,                                     # GA on every row
    "add-wrong": lambda z_t, y, omega: torch.where(           # GA where the teacher is wrong
        misclassified(z_t, y)[:, None], add_to_target(z_t, y, omega), z_t),
    "none": lambda z_t, y, omega: z_t}


def sld(student_logits, teacher_logits, target, *, epoch, gamma=150,
        temperatures=(1, 2, 3, 4, 5, 6), ce_weight=0.1, kd_weight=0.9, teacher_fix="swap",
        student_swap=True, detach=False, omega=None, standardize=False):
    """{"ce", "teacher", "student"}: Swapped Logit Distillation, (S6) for one view,
        a * CE + b * ( L_TS + 1[epoch > gamma] * L_SS ).

    Source: Limantoro et al., "Swapped Logit Distillation via Bi-level Teacher Alignment", 2025.
    epoch: counts from 1. gamma: the last epoch without L_SS; until then "student" is absent.
    temperatures: the K values of T. ce_weight, kd_weight: a and b.
    teacher_fix: of TEACHER_FIXES, above; "swap" is (S3). omega: what GA adds, in logit units.
    student_swap=False drops L_SS. detach: whether to stop the gradient through the pseudo-teacher.
    False is as released; True leaves a gradient of +-T (p_m - p_y) on the two swapped classes.
    standardize: as in kd, after the teacher's fix.
    Raises ValueError for another teacher_fix, an "add" without omega, and temperatures as in kd.
    """
    check(target, student_logits, teacher_logits)
    z_s, z_t = _float32(student_logits), _float32(teacher_logits)
    if teacher_fix not in TEACHER_FIXES:
        raise ValueError(f"teacher_fix {teacher_fix!r}: must be one of {', '.join(TEACHER_FIXES)}")
    if omega is None and teacher_fix.startswith("add"):
        raise ValueError(f"teacher_fix {teacher_fix!r} needs omega, what is added to the label")
    left_out = misclassified(z_t, target) if teacher_fix == "mask" else None             # (B,)
    z_t = TEACHER_FIXES[teacher_fix](z_t, target, omega)
    # For the pseudo-teacher in _margin the order does not matter: swap and standardize commute.
    x_s, x_t = _standardized_if(standardize, z_s, z_t)
    T, log_p_s, log_p_t = _soften(x_s, x_t, temperatures)

    terms = {"ce": ce_weight * _ce(z_s, target)}
    # (S3)  L_TS = sum over T of  T^2 * KL( p_T(swap(z_t, y)) || p_T(z_s) )
    terms["teacher"] = kd_weight * _kl(T, log_p_s, log_p_t, left_out)
    # (S5)  L_SS counts from epoch gamma + 1 on: before, the student's own predictions are so poor
    #       that they contradict the teacher.
    if student_swap and epoch > gamma:
        terms["student"] = kd_weight * _margin(T, log_p_s, x_s, target, detach)
    return terms


def _margin(T, log_p_s, z_s, target, detach):
    """(S4)  L_SS = sum over T of  T^2 * KL( p_T(swap(z_s, y)) || p_T(z_s) ),  in closed form.

    The swap exchanges the probabilities of two classes, the top m and the label y, whose logits are
    d = z_m - z_y >= 0 apart, and leaves the others. What remains of the KL is a margin penalty on
    the student's own mistakes; where it is right, value and gradient are zero. F.kl_div with a
    target that carries gradient is NaN once a probability underflows; this is not.
    """
    y, m = target[:, None], z_s.argmax(1, keepdim=True)                  # (B, 1) each
    d = z_s.gather(1, m) - z_s.gather(1, y)                              # (B, 1)
    p_m, p_y = (log_p_s.gather(-1, c.expand(len(T), -1, -1)).exp() for c in (m, y))  # (K, B, 1)
    gap = p_m - p_y
    # T^2 * KL = T * (p_m - p_y) * d,  summed over T, batch mean
    return (T * (gap.detach() if detach else gap) * d).sum() / len(z_s)


def _kl(T, log_p_s, log_p_t, left_out=None):
    """(S2), summed over the temperatures, batch mean. left_out: (B,) bool, rows that count 0."""
    kl_T = F.kl_div(log_p_s, log_p_t, reduction="none", log_target=True).sum(-1)  # (K, B)
    if left_out is not None:
        kl_T = kl_T.masked_fill(left_out, 0)                                      # still of B rows
    # sum over T of  T^2 * KL( p_T(z_t) || p_T(z_s) )
    return (T[:, 0].square() * kl_T).sum() / log_p_s.shape[1]


def _soften(z_s, z_t, temperatures):
    """T (K, 1, 1) and log p_T (K, B, C) of both, all K temperatures in one computation."""
    if not temperatures or not all(0 < t < math.inf for t in temperatures):
        raise ValueError(f"temperatures must be finite and above 0, at least one: {temperatures}")
    # Filled on the device: a copy from the host would make the GPU wait at every step.
    T = torch.cat([z_s.new_full((1, 1, 1), t) for t in temperatures])
    return T, F.log_softmax(z_s / T, -1), F.log_softmax(z_t / T, -1)


def _float32(logits):
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _ce(z_s, target):
    """Cross-entropy, batch mean. A label of -100 raises like any other that is no class."""
    return F.cross_entropy(z_s, target, ignore_index=-2 ** 63)


# --- The neighbours: what SLD is compared with ----------------------------------------------------

def dkd(student_logits, teacher_logits, target, *, epoch, warmup=20, alpha=1.0, beta=8.0,
        temperature=4.0, ce_weight=1.0, standardize=False):
    """{"ce", "teacher"}: Decoupled KD,  a * CE + min(epoch / warmup, 1) * (alpha TCKD + beta NCKD),

        TCKD = T^2 * KL( (p_y, 1 - p_y) of the teacher || the same of the student ),  p = p_T(z),
        NCKD = T^2 * KL of the two softmaxes over the other classes only.

    Source: Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022; beta 2 to 8 by network.
    KD is TCKD + (1 - p_y) * NCKD with the teacher's p_y: the surer it is, the less NCKD counts.
    epoch: counts from 1. warmup: epochs until the full weight, 1 for none; 0 raises
    ZeroDivisionError. ce_weight: a. standardize: as in kd.
    """
    check(target, student_logits, teacher_logits)
    z_s, z_t = _float32(student_logits), _float32(teacher_logits)
    x_s, x_t = _standardized_if(standardize, z_s, z_t)
    label = target[:, None]                                              # (B, 1)
    T, log_p_s, log_p_t = _soften(x_s, x_t, (temperature,))
    tckd = _kl(T, _against_rest(log_p_s, label), _against_rest(log_p_t, label))
    hidden = torch.zeros_like(z_s, dtype=torch.bool).scatter(1, label, True)
    nckd = _kl(T, _among_shown(x_s, T, hidden), _among_shown(x_t, T, hidden))
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
    epoch, warmup, ce_weight: as in dkd.
    """
    check(target, student_logits, teacher_logits)
    z_s, z_t = _float32(student_logits), _float32(teacher_logits)
    label, top = target[:, None], z_t.argmax(1, keepdim=True)            # (B, 1) each
    T_a, log_p_s, log_p_t = _soften(z_s, z_t, (alpha_temperature,))
    scd = _kl(T_a, _against_rest(log_p_s, label), _against_rest(log_p_t, top))
    T, hidden = z_t.new_full((1, 1, 1), temperature), z_t >= z_t.gather(1, label)    # hidden (B, C)
    mcd = _kl(T, _among_shown(z_s, T, hidden), _among_shown(z_t, T, hidden))
    return {"ce": ce_weight * _ce(z_s, target),
            "teacher": min(epoch / warmup, 1) * (alpha * scd + beta * mcd)}


def mlkd(student_logits, teacher_logits, target, *, temperatures=(2, 3, 4, 5, 6), ce_weight=0.1,
         kd_weight=0.9):
    """{"ce", "teacher", "batch", "class"}: Multi-level LD,  a * CE + b * sum over T of (S2) and of
        batch = ||P_t P_t' - P_s P_s'||^2 / B,   class = ||P_t' P_t - P_s' P_s||^2 / C,
    with P (B, C) the probabilities at T, and ||M||^2 the sum of M's squared entries.

    Source: Jin et al., "Multi-Level Logit Distillation", CVPR 2023.
    "batch": which images are alike; "class": which classes go together. Both compare all rows of
    a batch, so its halves do not add up to it; where the networks are sure, they grow like B / C
    and (B / C)^2, so few classes ask for a smaller rate. The released code's masks of confidence
    multiply means, which only halves terms: left out. Keywords: as in kd.
    """
    check(target, student_logits, teacher_logits)
    z_s, z_t = _float32(student_logits), _float32(teacher_logits)
    T, log_p_s, log_p_t = _soften(z_s, z_t, temperatures)
    P_s, P_t = log_p_s.exp(), log_p_t.exp()                                          # (K, B, C)
    with _without_autocast(z_s.device.type):
        images = P_t @ P_t.mT - P_s @ P_s.mT                                         # (K, B, B)
        classes = P_t.mT @ P_t - P_s.mT @ P_s                                        # (K, C, C)
    B, C = z_s.shape
    return {"ce": ce_weight * _ce(z_s, target),
            "teacher": kd_weight * _kl(T, log_p_s, log_p_t),
            "batch": kd_weight * images.square().sum() / B,
            "class": kd_weight * classes.square().sum() / C}


def _without_autocast(kind):
    """Autocast would round what enters a matrix product to half precision. "meta" knows none."""
    known = torch.amp.is_autocast_available(kind)
    return torch.autocast(kind if known else "cpu", enabled=False)


def _against_rest(log_p, c):
    """(log p_c, log(1 - p_c)) of one class c (B, 1) of each row: (1, B, 2). The second is a
    logsumexp over the other classes, since the log of a difference is -inf once p_c rounds to 1."""
    lowest = torch.finfo(log_p.dtype).min
    rest = log_p.scatter(-1, c[None], lowest).logsumexp(-1, keepdim=True)            # (1, B, 1)
    return torch.cat([log_p.gather(-1, c[None]), rest], -1)


def _among_shown(logits, T, hidden):
    """log p_T (1, B, C) over the classes that are not `hidden`, (B, C) bool. Hidden logits become
    the lowest number instead of -inf, so that the KL is 0 there, also in a row with all hidden,
    where -inf would give NaN."""
    lowest = torch.finfo(logits.dtype).min
    return F.log_softmax((logits / T).masked_fill(hidden, lowest), -1)


def standardize(logits):
    """z <- (z - mean) / (1e-7 + std), row by row, std with C - 1:  (B, C) -> (B, C).

    Source: Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024.
    The student need not match the teacher's shift and scale: a z + b with a > 0 gives the same. A
    swap permutes a row, so mean and std stay: standardize(swap(z, y)) = swap(standardize(z), y).
    """
    check(None, logits)
    z = _float32(logits)
    # std_mean is exact on a constant row, which mean() misses by a rounding.
    std, mean = torch.std_mean(z, 1, keepdim=True)                       # (B, 1) each
    # In a constant row std is 0. Dividing by 1e-7 would multiply its gradient by 1e7, so it is
    # divided by 1; the value is 0 either way.
    return (z - mean) / (1e-7 + std.masked_fill(std == 0, 1))


def _standardized_if(wanted, *logits):
    return [standardize(z) for z in logits] if wanted else logits


# What train.py's --method names.
OBJECTIVES = {"ce": ce, "kd": kd, "sld": sld, "dkd": dkd, "rld": rld, "mlkd": mlkd}
