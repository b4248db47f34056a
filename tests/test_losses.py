"""The objectives against the released code's numbers, float64 loops, hand derivatives, autograd."""
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import losses
from swap import add_to_target, swap

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.npz"))
T6 = (1, 2, 3, 4, 5, 6)


def batch(B=32, C=10, dtype=torch.float64, scale=3.0):
    z_s, z_t = scale * torch.randn(2, B, C, dtype=dtype)
    return z_s.requires_grad_(), z_t, torch.randint(C, (B,))


def plain_kl(z_s, z_t, T):
    """(S2) in plain Python."""
    total = 0.0
    for s, t in zip(z_s.tolist(), z_t.tolist()):
        log_norm_s = math.log(sum(math.exp(v / T) for v in s))
        log_norm_t = math.log(sum(math.exp(v / T) for v in t))
        for a, b in zip(s, t):
            log_p, log_q = a / T - log_norm_s, b / T - log_norm_t
            total += math.exp(log_q) * (log_q - log_p)
    return T * T * total / len(z_s)


def test_there_are_three_golden_files():
    assert [path.name for path in GOLDEN] == [f"official_sld_{k}.npz" for k in "abc"]


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
@pytest.mark.parametrize("epoch", [150, 151])
def test_golden_values_and_gradients(path, epoch):
    golden = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}
    target = golden["target"]
    # Stored as float32: 0.1, not 0.10000000149.
    a, b = (round(weight, 6) for weight in golden["weights"].tolist())
    for who in ("teacher", "student"):
        assert torch.equal(swap(golden[f"{who}_weak"], target), golden[f"swap_{who}_weak"])
    students = [golden[f"student_{view}"].clone().requires_grad_() for view in ("weak", "strong")]
    views = [losses.sld(z, golden[f"teacher_{view}"], target, epoch=epoch, ce_weight=a, kd_weight=b)
             for z, view in zip(students, ("weak", "strong"))]
    assert [list(terms) for terms in views] == [["ce", "teacher"] + ["student"] * (epoch > 150)] * 2
    ce = sum(terms["ce"] for terms in views)
    kd = sum(term for terms in views for name, term in terms.items() if name != "ce")
    exact = dict(rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ce, golden[f"loss_ce_epoch{epoch}"], **exact)
    torch.testing.assert_close(kd, golden[f"loss_kd_epoch{epoch}"], **exact)
    for view, gradient in zip(("weak", "strong"), torch.autograd.grad(ce + kd, students)):
        torch.testing.assert_close(gradient, golden[f"grad_student_{view}_epoch{epoch}"], **exact)


@pytest.mark.parametrize("T", [1, 2.5, 4])
def test_kl_is_the_plain_python_kl(T):
    z_s, z_t, _ = batch()
    assert losses.kl(z_s, z_t, T).item() == pytest.approx(plain_kl(z_s, z_t, T), rel=1e-12)
    assert losses.kl(z_t, z_t, T).item() == pytest.approx(0, abs=1e-14)


def test_the_gradient_of_kl_is_T_times_the_difference_of_probabilities():
    z_s, z_t, _ = batch()
    for T in T6:
        expected = T * ((z_s / T).softmax(1) - (z_t / T).softmax(1)) / len(z_s)
        gradient, = torch.autograd.grad(losses.kl(z_s, z_t, T), z_s)
        torch.testing.assert_close(gradient, expected.detach())


def test_ce_and_kd_are_their_parts():
    z_s, z_t, y = batch()
    assert losses.ce(z_s, y)["ce"].item() == F.cross_entropy(z_s, y).item()
    terms = losses.kd(z_s, z_t, y, temperatures=(2.0, 5.0), ce_weight=0.3, kd_weight=0.6)
    assert terms["ce"].item() == pytest.approx(0.3 * F.cross_entropy(z_s, y).item())
    both = plain_kl(z_s, z_t, 2.0) + plain_kl(z_s, z_t, 5.0)
    assert terms["teacher"].item() == pytest.approx(0.6 * both)
    default = losses.kd(z_s, z_t, y)
    assert default["teacher"].item() == pytest.approx(0.9 * plain_kl(z_s, z_t, 4.0))


def test_plain_kd_never_sees_the_label():
    z_s, z_t, y = batch()
    other = (y + 1) % 10
    assert losses.kd(z_s, z_t, y)["teacher"].item() == losses.kd(z_s, z_t, other)["teacher"].item()


def test_sld_against_a_loop_of_single_kls():
    z_s, z_t, y = batch(C=100)
    terms = losses.sld(z_s, z_t, y, epoch=151)
    teacher = 0.9 * sum(losses.kl(z_s, swap(z_t, y), T) for T in T6)
    student = 0.9 * sum(losses.kl(z_s, swap(z_s, y), T) for T in T6)
    for term, loop in ((terms["teacher"], teacher), (terms["student"], student)):
        torch.testing.assert_close(term, loop, rtol=1e-12, atol=1e-12)
        gradients = (torch.autograd.grad(v, z_s, retain_graph=True)[0] for v in (term, loop))
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_the_detached_pseudo_teacher_against_a_loop():
    z_s, z_t, y = batch(C=100)
    ours = losses.sld(z_s, z_t, y, epoch=151, detach=True)["student"]
    loop = 0.9 * sum(losses.kl(z_s, swap(z_s, y).detach(), T) for T in T6)
    torch.testing.assert_close(ours, loop, rtol=1e-12, atol=1e-12)
    gradients = (torch.autograd.grad(v, z_s)[0] for v in (ours, loop))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("detach", [False, True])
def test_the_hand_derivatives_of_the_pseudo_teacher(detach):
    z_s, z_t, y = batch(B=50, C=7)
    for T in (1, 4):
        terms = losses.sld(z_s, z_t, y, epoch=1, gamma=0, temperatures=(T,), kd_weight=1.0,
                           detach=detach)
        gradient = torch.autograd.grad(terms["student"], z_s)[0] * len(y)
        p = (z_s.detach() / T).softmax(1)
        for i, label in enumerate(y.tolist()):
            m = z_s[i].argmax().item()
            expected = torch.zeros(7, dtype=torch.float64)
            if m != label:
                d, gap = (z_s[i, m] - z_s[i, label]).item(), p[i, m] - p[i, label]
                if not detach:
                    expected = -d * p[i] * gap
                    expected[m] = d * p[i, m] * (1 - gap)
                    expected[label] = -d * p[i, label] * (1 + gap)
                expected[m] += T * gap
                expected[label] -= T * gap
            torch.testing.assert_close(gradient[i], expected, rtol=1e-10, atol=1e-12)


def test_the_pseudo_teacher_is_silent_where_the_student_is_right():
    z_s, z_t, _ = batch()
    term = losses.sld(z_s, z_t, z_s.argmax(1), epoch=151)["student"]
    assert term.item() == 0 and not torch.autograd.grad(term, z_s)[0].any()


def test_the_schedule_is_a_step_after_gamma():
    z_s, z_t, y = batch()
    for epoch, gamma, there in ((1, 150, False), (150, 150, False), (151, 150, True),
                                (1, 0, True), (240, 240, False)):
        assert ("student" in losses.sld(z_s, z_t, y, epoch=epoch, gamma=gamma)) == there
    assert "student" not in losses.sld(z_s, z_t, y, epoch=151, student_swap=False)


def test_the_teacher_fixes():
    z_s, z_t, y = batch()
    term = {fix: losses.sld(z_s, z_t, y, epoch=1, teacher_fix=fix, omega=omega)["teacher"].item()
            for fix, omega in (("swap", None), ("add", 1.5), ("none", None))}
    fixed = dict(swap=swap(z_t, y), add=add_to_target(z_t, y, 1.5), none=z_t)
    for fix, value in term.items():
        assert value == pytest.approx(0.9 * sum(plain_kl(z_s, fixed[fix], T) for T in T6))
    assert term["none"] == losses.kd(z_s, z_t, y, temperatures=T6)["teacher"].item()
    with pytest.raises(ValueError, match="omega"):
        losses.sld(z_s, z_t, y, epoch=1, teacher_fix="add")
    with pytest.raises(ValueError, match="swop"):
        losses.sld(z_s, z_t, y, epoch=1, teacher_fix="swop")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_taken_to_float32_first(dtype):
    z_s, z_t, y = batch(dtype=torch.float32)
    z_s, z_t = z_s.detach().to(dtype), z_t.to(dtype)
    for objective in OBJECTIVES.values():
        half, full = objective(z_s, z_t, y), objective(z_s.float(), z_t.float(), y)
        for name in full:
            assert half[name].dtype == torch.float32 and half[name].item() == full[name].item()


def test_large_gaps_stay_finite():
    z_s = torch.tensor([[300., -300., 0.], [0., 0., 0.], [-500., 500., 1.]], requires_grad=True)
    z_t = torch.tensor([[-300., 300., 0.], [0., 0., 0.], [500., -500., 1.]])
    y = torch.tensor([1, 2, 0])
    terms = losses.sld(z_s, z_t, y, epoch=151)
    gradient = torch.autograd.grad(sum(terms.values()), z_s)[0]
    assert all(term.isfinite() for term in terms.values()) and gradient.isfinite().all()


OBJECTIVES = {
    "kl": lambda s, t, y: {"kl": losses.kl(s, t, 4)},
    "ce": lambda s, t, y: losses.ce(s, y),
    "kd": lambda s, t, y: losses.kd(s, t, y, temperatures=T6),
    "sld": lambda s, t, y: losses.sld(s, t, y, epoch=151),
    "sld detached": lambda s, t, y: losses.sld(s, t, y, epoch=151, detach=True),
    "sld with GA": lambda s, t, y: losses.sld(s, t, y, epoch=151, teacher_fix="add", omega=1e4),
}


def extreme_logits(C=10):
    """Rows up to +-1e4: random, signs at the limit, one-hot both ways, equal, tied at the top."""
    g = torch.Generator().manual_seed(0)
    hot = 1e4 * torch.eye(C)
    tied = torch.cat([hot[:C // 2] + hot[C // 2:], hot[:C // 2] - hot[C // 2:]])
    return torch.cat([2e4 * torch.rand(40, C, generator=g) - 1e4,
                      1e4 * torch.randn(40, C, generator=g).sign(), hot, -hot, torch.zeros(4, C),
                      torch.full((4, C), 1e4), torch.full((4, C), -1e4), tied])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_extreme_logits_give_finite_values_and_gradients(name, dtype):
    z_s = extreme_logits().to(dtype)
    # Every kind of student meets other kinds of teacher.
    for shuffled in (z_s, z_s.flip(0), z_s[torch.randperm(len(z_s))], -z_s):
        student, teacher = z_s.clone().requires_grad_(), shuffled.clone().requires_grad_()
        for label in (0, 9):
            terms = OBJECTIVES[name](student, teacher.detach(), torch.full((len(z_s),), label))
            gradient = torch.autograd.grad(sum(terms.values()), student)[0]
            assert all(term.isfinite() for term in terms.values())
            assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_half_precision_logits_are_close_to_float64(name, dtype, tolerance):
    z_s, z_t, y = batch(64, 100)
    exact = OBJECTIVES[name](z_s, z_t, y)
    # The losses do not mind being called within autocast.
    with torch.autocast("cpu", dtype):
        rounded = OBJECTIVES[name](z_s.to(dtype), z_t.to(dtype), y)
    for term in exact:
        assert rounded[term].item() == pytest.approx(exact[term].item(), rel=tolerance)
