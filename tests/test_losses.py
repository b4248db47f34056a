"""The objectives against the released code's numbers, float64 loops, hand derivatives, autograd."""
import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import losses
from swap import add_to_target, misclassified, sort_to_target, swap

GOLDEN = sorted((Path(__file__).parent / "golden").glob("official_sld_*.npz"))
NEIGHBOURS = sorted((Path(__file__).parent / "golden").glob("neighbours_*.npz"))
SORT_MLKD = sorted((Path(__file__).parent / "golden").glob("sort_mlkd_*.npz"))
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


def plain_softmax(row, T):
    exps = [math.exp(v / T) for v in row]
    return [e / sum(exps) for e in exps]


def plain_divergence(p, q):
    """KL(p || q) of two lists of probabilities."""
    return sum(a * math.log(a / b) for a, b in zip(p, q))


def plain_dkd(z_s, z_t, target, alpha, beta, T):
    """alpha TCKD + beta NCKD in plain Python."""
    total = 0.0
    for s, t, y in zip(z_s.tolist(), z_t.tolist(), target.tolist()):
        p, q = plain_softmax(t, T)[y], plain_softmax(s, T)[y]
        total += alpha * T * T * plain_divergence([p, 1 - p], [q, 1 - q])
        others = [c for c in range(len(s)) if c != y]
        p, q = (plain_softmax([row[c] for c in others], T) for row in (t, s))
        total += beta * T * T * plain_divergence(p, q)
    return total / len(z_s)


def plain_rld(z_s, z_t, target, alpha, beta, T, T_a):
    """alpha SCD + beta MCD in plain Python."""
    total = 0.0
    for s, t, y in zip(z_s.tolist(), z_t.tolist(), target.tolist()):
        p, q = max(plain_softmax(t, T_a)), plain_softmax(s, T_a)[y]
        total += alpha * T_a * T_a * plain_divergence([p, 1 - p], [q, 1 - q])
        below = [c for c in range(len(s)) if t[c] < t[y]]
        if below:
            p, q = (plain_softmax([row[c] for c in below], T) for row in (t, s))
            total += beta * T * T * plain_divergence(p, q)
    return total / len(z_s)


def plain_mlkd(z_s, z_t, T):
    """"batch" and "class" at one temperature in plain Python: pairs of rows, pairs of columns."""
    def products(vectors):
        return [[sum(a * b for a, b in zip(u, v)) for v in vectors] for u in vectors]

    def distance(these, those):
        return sum((a - b) ** 2 for pair in zip(these, those) for a, b in zip(*pair))
    rows = [[plain_softmax(row, T) for row in z.tolist()] for z in (z_t, z_s)]
    columns = [list(zip(*p)) for p in rows]
    return [distance(*map(products, p)) / len(p[0]) for p in (rows, columns)]


def plain_standardize(z):
    rows = []
    for row in z.tolist():
        mean = sum(row) / len(row)
        std = math.sqrt(sum((v - mean) ** 2 for v in row) / (len(row) - 1))
        rows.append([(v - mean) / (1e-7 + std) for v in row])
    return torch.tensor(rows, dtype=torch.float64)


def test_the_golden_files_are_there():
    assert [path.name for path in GOLDEN] == [f"official_sld_{k}.npz" for k in "abc"]
    assert [path.name for path in NEIGHBOURS] == [f"neighbours_{k}.npz" for k in "ab"]
    assert [path.name for path in SORT_MLKD] == [f"sort_mlkd_{k}.npz" for k in "ab"]


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


# What the released code of DKD, RLD and logit standardization names its terms; no CE, no warm-up.
RELEASED = {
    "dkd_a1_b8_T4": lambda s, t, y: losses.dkd(s, t, y, epoch=20),
    "dkd_a1_b2_T4": lambda s, t, y: losses.dkd(s, t, y, epoch=20, beta=2),
    "rld_a1_b8_T4_aT1": lambda s, t, y: losses.rld(s, t, y, epoch=20),
    "rld_a1_b8_T4_aT4": lambda s, t, y: losses.rld(s, t, y, epoch=20, alpha_temperature=4),
    "kd_standardized_T2": lambda s, t, y: losses.kd(s, t, y, temperatures=(2,), kd_weight=1,
                                                    standardize=True),
    "dkd_standardized_a1_b8_T2": lambda s, t, y: losses.dkd(s, t, y, epoch=20, temperature=2,
                                                            standardize=True),
}


@pytest.mark.parametrize("path", NEIGHBOURS, ids=lambda path: path.stem)
def test_golden_values_and_gradients_of_the_neighbours(path):
    golden = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}
    student, teacher, y = (golden.pop(name) for name in ("student", "teacher", "target"))
    student.requires_grad_()
    # A key that nothing below reads fails here, and so does one that is missing.
    assert set(golden) == {f"{kind}_{name}" for kind in ("loss", "grad") for name in RELEASED}
    for name, objective in RELEASED.items():
        term = objective(student, teacher, y)["teacher"]
        gradient, = torch.autograd.grad(term, student)
        exact = dict(rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(term.detach(), golden[f"loss_{name}"], **exact)
        torch.testing.assert_close(gradient, golden[f"grad_{name}"], **exact)


def sld_sorted(T):
    return lambda s, t, y: losses.sld(s, t, y, epoch=1, temperatures=(T,), kd_weight=1,
                                      teacher_fix="sort")["teacher"]


def mlkd_term(name):
    return lambda s, t, y: losses.mlkd(s, t, y, kd_weight=1)[name]


# What the released code of sorting and of MLKD, that without its masks, returns.
RELEASED_LATER = {"kd_sorted_T1": sld_sorted(1), "kd_sorted_T4": sld_sorted(4),
                  "mlkd_instance": mlkd_term("teacher"), "mlkd_batch": mlkd_term("batch"),
                  "mlkd_class": mlkd_term("class")}


@pytest.mark.parametrize("path", SORT_MLKD, ids=lambda path: path.stem)
def test_golden_values_and_gradients_of_sorting_and_mlkd(path):
    golden = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(path).items()}
    student, teacher, y = (golden.pop(name) for name in ("student", "teacher", "target"))
    assert torch.equal(sort_to_target(teacher, y), golden.pop("sort_teacher"))
    student.requires_grad_()
    assert set(golden) == {f"{kind}_{name}" for kind in ("loss", "grad") for name in RELEASED_LATER}
    for name, function in RELEASED_LATER.items():
        term = function(student, teacher, y)
        gradient, = torch.autograd.grad(term, student)
        exact = dict(rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(term.detach(), golden[f"loss_{name}"], **exact)
        torch.testing.assert_close(gradient, golden[f"grad_{name}"], **exact)


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


@pytest.mark.parametrize("standardize", [False, True])
def test_plain_kd_never_sees_the_label(standardize):
    z_s, z_t, y = batch()
    term, other = (losses.kd(z_s, z_t, label, standardize=standardize)["teacher"].item()
                   for label in (y, (y + 1) % 10))
    assert term == other


@pytest.mark.parametrize("T", [1, 4])
def test_dkd_and_rld_are_the_plain_python_ones(T):
    z_s, z_t, y = batch(B=40, C=5)
    # A wrong teacher, a right one, and one that puts the label last, which has no class below it.
    y[:3] = torch.stack([z_t[0].argmin(), z_t[1].argmax(), z_t[2].argmin()])
    options = dict(epoch=20, alpha=0.7, beta=3.0, temperature=T, ce_weight=0.3)
    for terms, plain in (
            (losses.dkd(z_s, z_t, y, **options), plain_dkd(z_s, z_t, y, 0.7, 3, T)),
            (losses.dkd(z_s, z_t, y, standardize=True, **options),
             plain_dkd(plain_standardize(z_s), plain_standardize(z_t), y, 0.7, 3, T)),
            (losses.rld(z_s, z_t, y, alpha_temperature=2.5, **options),
             plain_rld(z_s, z_t, y, 0.7, 3, T, 2.5))):
        assert list(terms) == ["ce", "teacher"]
        assert terms["ce"].item() == pytest.approx(0.3 * F.cross_entropy(z_s, y).item())
        assert terms["teacher"].item() == pytest.approx(plain, rel=1e-12)


@pytest.mark.parametrize("standardize", [False, True])
def test_dkd_of_one_row_is_kd_where_beta_is_what_the_teacher_leaves_the_others(standardize):
    """KD = TCKD + (1 - p_y) * NCKD with the teacher's p_y, value and gradient."""
    for _ in range(10):
        z_s, z_t, y = batch(B=1)
        p_t = ((losses.standardize(z_t) if standardize else z_t) / 4).softmax(1)
        dkd = losses.dkd(z_s, z_t, y, epoch=20, beta=1 - p_t[0, y].item(), standardize=standardize)
        kd = losses.kd(z_s, z_t, y, kd_weight=1, standardize=standardize)
        gradients = (torch.autograd.grad(v["teacher"], z_s)[0] for v in (dkd, kd))
        torch.testing.assert_close(dkd["teacher"], kd["teacher"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [3, 1e4])
def test_dkd_of_two_classes_is_kd(scale):
    """Nothing is left to decouple; also where a probability is 1 - exp(-2500)."""
    z_s, z_t, y = batch(C=2, scale=scale)
    dkd = losses.dkd(z_s, z_t, y, epoch=20)["teacher"]
    kd = losses.kd(z_s, z_t, y, kd_weight=1)["teacher"]
    gradients = (torch.autograd.grad(v, z_s)[0] for v in (dkd, kd))
    torch.testing.assert_close(dkd, kd, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_mlkd_is_the_plain_python_one():
    z_s, z_t, y = batch(B=7, C=5)
    terms = losses.mlkd(z_s, z_t, y, temperatures=(1, 3), ce_weight=0.3, kd_weight=0.6)
    assert list(terms) == ["ce", "teacher", "batch", "class"]
    assert terms["ce"].item() == pytest.approx(0.3 * F.cross_entropy(z_s, y).item())
    kl = sum(plain_kl(z_s, z_t, T) for T in (1, 3))
    images, classes = map(sum, zip(*(plain_mlkd(z_s, z_t, T) for T in (1, 3))))
    for name, plain in (("teacher", kl), ("batch", images), ("class", classes)):
        assert terms[name].item() == pytest.approx(0.6 * plain, rel=1e-12)
    assert torch.autograd.gradcheck(lambda z: tuple(losses.mlkd(z, z_t, y).values()), z_s)
    same = losses.mlkd(z_s, z_s.detach(), y, ce_weight=0)
    assert sum(same.values()).item() == pytest.approx(0, abs=1e-14)


def test_mlkd_compares_images_by_their_classes_and_classes_by_their_images():
    """"batch" does not know a class by its number, nor "class" an image."""
    z_s, z_t, y = batch(B=16, C=10)
    terms = losses.mlkd(z_s, z_t, y)
    for same, other, moved in (("batch", "class", z_s.roll(1, dims=1)),
                               ("class", "batch", z_s.roll(1, dims=0))):
        found = losses.mlkd(moved, z_t, y)
        assert found[same].item() == pytest.approx(terms[same].item(), rel=1e-12)
        assert found[other].item() != pytest.approx(terms[other].item(), rel=1e-2)


@pytest.mark.parametrize("name", ["dkd", "rld"])
def test_a_shift_of_all_logits_changes_nothing(name):
    """However low they are, what is hidden stays lower."""
    z_s, z_t, y = batch()
    objective = partial(getattr(losses, name), target=y, epoch=20)
    expected = objective(z_s, z_t)["teacher"].item()
    for shift in (-1e4, 1e4):
        moved = objective(z_s + shift, z_t + shift)["teacher"].item()
        assert moved == pytest.approx(expected, rel=1e-9)


def test_the_second_term_leaves_the_hidden_classes_alone():
    """dkd's hides the label, rld's all that the teacher does not put below it."""
    z_s, z_t, y = batch()
    hidden = dict(dkd=F.one_hot(y, 10).bool(), rld=z_t >= z_t.gather(1, y[:, None]))
    for name, hide in hidden.items():
        objective = partial(getattr(losses, name), target=y, epoch=20, alpha=0)
        term = objective(z_s, z_t)["teacher"]
        gradient, = torch.autograd.grad(term, z_s)
        assert not gradient[hide].any() and gradient[~hide].any()
        # What is hidden goes up, and so stays hidden.
        assert objective(z_s + 5 * hide, z_t + 5 * hide)["teacher"].item() == term.item()


def test_rld_counts_0_where_no_class_is_below_the_label():
    z_s, z_t, y = batch()
    last, tied = z_t.argmin(1), torch.zeros_like(z_t)
    # A NaN on the way fails too, even where a later step of the backward pass covers it.
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        for teacher, label in ((z_t, last), (tied, y)):
            term = losses.rld(z_s, teacher, label, epoch=20, alpha=0)["teacher"]
            assert term.item() == 0 and not torch.autograd.grad(term, z_s)[0].any()
        # Such a row is still one of the batch: the mean is over all rows.
        z_t, y, half = z_t.clone(), y.clone(), len(y) // 2
        y[half:] = last[half:]
        mixed = losses.rld(z_s, z_t, y, epoch=20, alpha=0)["teacher"]
        first = losses.rld(z_s[:half], z_t[:half], y[:half], epoch=20, alpha=0)["teacher"]
        assert mixed.item() == pytest.approx(first.item() / 2, rel=1e-12)
        gradient, = torch.autograd.grad(mixed, z_s)
        assert gradient[:half].any() and not gradient[half:].any()


@pytest.mark.parametrize("name", ["dkd", "rld"])
def test_the_teacher_term_warms_up_in_a_line(name):
    z_s, z_t, y = batch()
    objective = getattr(losses, name)
    full = objective(z_s, z_t, y, epoch=1000)
    for epoch, warmup, factor in ((1, 20, 0.05), (10, 20, 0.5), (20, 20, 1), (21, 20, 1),
                                  (1, 1, 1), (3, 4, 0.75)):
        terms = objective(z_s, z_t, y, epoch=epoch, warmup=warmup)
        assert terms["teacher"].item() == pytest.approx(factor * full["teacher"].item(), rel=1e-12)
        assert terms["ce"].item() == full["ce"].item() == F.cross_entropy(z_s, y).item()


def test_standardize_is_the_plain_python_one():
    z, _, _ = batch()
    x = losses.standardize(z)
    exact = dict(rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.detach(), plain_standardize(z), **exact)
    torch.testing.assert_close(x.mean(1), torch.zeros(32).double(), **exact)
    # 1e-7 is added to a std of about 3.
    torch.testing.assert_close(x.std(1), torch.ones(32).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(losses.standardize(7 * z - 3), x, rtol=1e-6, atol=1e-9)
    assert torch.autograd.gradcheck(losses.standardize, z[:3])


def test_standardize_makes_a_constant_row_0_and_lets_its_gradient_be():
    """Of a network whose last layer starts at 0, for one."""
    constant = torch.full((2, 10), 0.1, requires_grad=True)
    x = losses.standardize(constant)
    gradient, = torch.autograd.grad(x[0, 0], constant)
    assert not x.any() and gradient[0].tolist() == pytest.approx([0.9] + 9 * [-0.1])


def test_standardized_terms_see_neither_shift_nor_scale_and_ce_sees_raw_logits():
    z_s, z_t, y = batch()
    for objective in (losses.kd, partial(losses.dkd, epoch=20), partial(losses.sld, epoch=151)):
        raw, terms = objective(z_s, z_t, y), objective(z_s, z_t, y, standardize=True)
        moved = objective(0.5 * z_s + 2, 4 * z_t - 1, y, standardize=True)
        assert terms["ce"].item() == raw["ce"].item()
        assert list(terms) == list(raw)
        for name in set(terms) - {"ce"}:
            assert terms[name].item() == pytest.approx(moved[name].item(), rel=1e-6)
            assert terms[name].item() != pytest.approx(raw[name].item(), rel=1e-2)


@pytest.mark.parametrize("detach", [False, True])
def test_sld_standardizes_after_the_swap_and_the_pseudo_teacher_too(detach):
    z_s, z_t, y = batch(C=100)
    terms = losses.sld(z_s, z_t, y, epoch=151, detach=detach, standardize=True)
    added = losses.sld(z_s, z_t, y, epoch=1, teacher_fix="add", omega=1.5, standardize=True)
    x_s, pseudo = losses.standardize(z_s), losses.standardize(swap(z_s, y))
    fixed = {"teacher": losses.standardize(swap(z_t, y)),
             "student": pseudo.detach() if detach else pseudo,
             "added": losses.standardize(add_to_target(z_t, y, 1.5))}
    for name, term in (("teacher", terms["teacher"]), ("student", terms["student"]),
                       ("added", added["teacher"])):
        loop = 0.9 * sum(losses.kl(x_s, fixed[name], T) for T in T6)
        torch.testing.assert_close(term, loop, rtol=1e-12, atol=1e-12)
        gradients = (torch.autograd.grad(v, z_s, retain_graph=True)[0] for v in (term, loop))
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("label", [-1, 10])
def test_a_label_outside_the_classes_raises(label):
    z_s, z_t, y = batch()
    y[3] = label
    for name in set(OBJECTIVES) - {"kl"}:
        with pytest.raises((RuntimeError, IndexError)):
            OBJECTIVES[name](z_s, z_t, y)


def test_no_objective_reads_a_number():
    """A tensor on "meta" has none: what would make a GPU wait for the CPU, a mask as an index or
    .item(), raises."""
    z = torch.empty(8, 10, device="meta", requires_grad=True)
    y = torch.empty(8, dtype=torch.int64, device="meta")
    for objective in OBJECTIVES.values():
        sum(objective(z, z.detach(), y).values()).backward()
    with pytest.raises((RuntimeError, NotImplementedError)):
        z[z > 0].sum()


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


def half_right(B=32, C=10):
    """A batch whose teacher gets the even rows right."""
    z_s, z_t, _ = batch(B, C)
    y = torch.where(torch.arange(B) % 2 == 0, z_t.argmax(1), z_t.argmin(1))
    return z_s, z_t, y


def test_the_teacher_fixes():
    z_s, z_t, y = half_right()
    term = {fix: losses.sld(z_s, z_t, y, epoch=1, teacher_fix=fix,
                            omega=1.5 if "add" in fix else None)["teacher"].item()
            for fix in losses.TEACHER_FIXES}
    added = add_to_target(z_t, y, 1.5)
    where_wrong = z_t.clone()
    where_wrong[1::2] = added[1::2]
    fixed = {"swap": swap(z_t, y), "sort": sort_to_target(z_t, y), "add": added,
             "add-wrong": where_wrong, "none": z_t}
    assert term.keys() == fixed.keys() | {"mask"}
    for fix, teacher in fixed.items():
        assert term[fix] == pytest.approx(0.9 * sum(plain_kl(z_s, teacher, T) for T in T6))
    # Half of the rows are left out, and the mean is over all.
    kept = 0.9 * sum(plain_kl(z_s[::2], z_t[::2], T) for T in T6) / 2
    assert term["mask"] == pytest.approx(kept)
    assert term["none"] == losses.kd(z_s, z_t, y, temperatures=T6)["teacher"].item()
    for fix in ("add", "add-wrong"):
        with pytest.raises(ValueError, match="omega"):
            losses.sld(z_s, z_t, y, epoch=1, teacher_fix=fix)
    with pytest.raises(ValueError, match="swop"):
        losses.sld(z_s, z_t, y, epoch=1, teacher_fix="swop")


@pytest.mark.parametrize("standardize", [False, True])
def test_mask_leaves_out_the_kl_of_the_wrong_rows_and_nothing_else(standardize):
    z_s, z_t, y = half_right()
    masked, plain = (losses.sld(z_s, z_t, y, epoch=151, teacher_fix=fix, standardize=standardize)
                     for fix in ("mask", "none"))
    gradients = [torch.autograd.grad(terms["teacher"], z_s, retain_graph=True)[0]
                 for terms in (masked, plain)]
    assert not gradients[0][1::2].any() and torch.equal(gradients[0][::2], gradients[1][::2])
    # The label and the student's own swap teach these rows as ever.
    for name in ("ce", "student"):
        assert masked[name].item() == plain[name].item()
        gradients = [torch.autograd.grad(terms[name], z_s, retain_graph=True)[0]
                     for terms in (masked, plain)]
        assert gradients[0][1::2].any() and torch.equal(*gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_masked_row_counts_exactly_0_however_far_teacher_and_student_are_apart(dtype):
    z_s = 1e4 * (torch.eye(4, dtype=dtype) - torch.eye(4, dtype=dtype).roll(1, 0))
    z_s.requires_grad_()
    z_t = -z_s.detach()
    term = losses.sld(z_s, z_t, z_t.argmin(1), epoch=1, teacher_fix="mask")["teacher"]
    assert term.item() == 0 and not torch.autograd.grad(term, z_s)[0].any()


@pytest.mark.parametrize("fix", ["mask", "add-wrong", "sort", "swap"])
def test_a_tie_for_the_first_rank_is_no_mistake(fix):
    z_s, z_t, y = batch()
    z_t = z_t.scatter(1, y[:, None], z_t.amax(1, keepdim=True))
    assert not misclassified(z_t, y).any() and (z_t.argmax(1) != y).any()
    fixed, plain = (losses.sld(z_s, z_t, y, epoch=1, teacher_fix=name, omega=2.0)["teacher"].item()
                    for name in (fix, "none"))
    assert fixed == plain


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_taken_to_float32_first(dtype):
    z_s, z_t, y = batch(dtype=torch.float32)
    z_s, z_t = z_s.detach().to(dtype), z_t.to(dtype)
    for objective in OBJECTIVES.values():
        half, full = objective(z_s, z_t, y), objective(z_s.float(), z_t.float(), y)
        for name in full:
            assert half[name].dtype == torch.float32 and half[name].item() == full[name].item()
    assert torch.equal(losses.standardize(z_s), losses.standardize(z_s.float()))


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
    "sld with GA where wrong": lambda s, t, y: losses.sld(s, t, y, epoch=151, omega=1e4,
                                                          teacher_fix="add-wrong"),
    "sld sorted": lambda s, t, y: losses.sld(s, t, y, epoch=151, teacher_fix="sort"),
    "sld masked": lambda s, t, y: losses.sld(s, t, y, epoch=151, teacher_fix="mask"),
    "dkd": lambda s, t, y: losses.dkd(s, t, y, epoch=20),
    "rld": lambda s, t, y: losses.rld(s, t, y, epoch=20),
    "rld at one T": lambda s, t, y: losses.rld(s, t, y, epoch=20, alpha_temperature=4),
    "mlkd": lambda s, t, y: losses.mlkd(s, t, y),
    "kd standardized": lambda s, t, y: losses.kd(s, t, y, standardize=True),
    "dkd standardized": lambda s, t, y: losses.dkd(s, t, y, epoch=20, standardize=True),
    "sld standardized": lambda s, t, y: losses.sld(s, t, y, epoch=151, standardize=True),
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


@pytest.mark.parametrize("name", OBJECTIVES)
def test_autocast_rounds_nothing(name):
    z_s, z_t, y = batch(64, 100, torch.float32)
    exact = OBJECTIVES[name](z_s, z_t, y)
    with torch.autocast("cpu", torch.bfloat16):
        found = OBJECTIVES[name](z_s, z_t, y)
    for term in exact:
        assert found[term].dtype == torch.float32 and found[term].item() == exact[term].item()


@pytest.mark.parametrize("name", ["dkd", "rld", "rld at one T"])
def test_a_sure_teacher_and_a_sure_student_lose_no_digits_in_float32(name):
    """1 - p_y is below float32's rounding of 1 here, so a plain subtraction would give 0."""
    z_s, z_t, y = batch(64, 10, scale=30.0)
    exact = OBJECTIVES[name](z_s, z_t, y)["teacher"]
    single = OBJECTIVES[name](z_s.float(), z_t.float(), y)["teacher"]
    gradients = (torch.autograd.grad(v, z_s)[0] for v in (exact, single))
    assert single.item() == pytest.approx(exact.item(), rel=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


Y = torch.tensor([0, 1, 2, 3])
WRONG_SHAPES = {
    "a teacher of one row": (torch.zeros(4, 5), torch.zeros(1, 5), Y),
    "a teacher of one column": (torch.zeros(4, 5), torch.zeros(4, 1), Y),
    "a teacher without rows": (torch.zeros(4, 5), torch.zeros(5), Y),
    "three dimensions": (torch.zeros(4, 5, 2), torch.zeros(4, 5, 2), Y),
    "one class": (torch.zeros(4, 1), torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64)),
    "an empty batch": (torch.zeros(0, 5), torch.zeros(0, 5), Y[:0]),
    "fewer labels": (torch.zeros(4, 5), torch.zeros(4, 5), Y[:2]),
    "labels in a column": (torch.zeros(4, 5), torch.zeros(4, 5), Y[:, None]),
}
OF_TWO = {
    "kd": losses.kd, "sld": lambda s, t, y: losses.sld(s, t, y, epoch=151),
    "dkd": lambda s, t, y: losses.dkd(s, t, y, epoch=1),
    "rld": lambda s, t, y: losses.rld(s, t, y, epoch=1), "mlkd": losses.mlkd,
}


@pytest.mark.parametrize("shapes", WRONG_SHAPES)
def test_wrong_shapes_raise_and_are_named(shapes):
    z_s, z_t, y = WRONG_SHAPES[shapes]
    for objective in OF_TWO.values():
        with pytest.raises(ValueError, match=re.escape(str(tuple(z_t.shape)))):
            objective(z_s, z_t, y)
    # With the teacher's logits alone, wherever they are what is wrong.
    for function in (losses.ce, losses.swap, losses.sort_to_target,
                     lambda z, y: losses.add_to_target(z, y, 1.0)):
        with pytest.raises(ValueError, match=re.escape(str(tuple(y.shape)))):
            function(z_t, y)
    if "labels" not in shapes:
        with pytest.raises(ValueError, match="needs logits"):
            losses.kl(z_s, z_t, 4.0)


@pytest.mark.parametrize("objective", [*OF_TWO, "ce"])
@pytest.mark.parametrize("label", [-100, -1, 5])
def test_a_label_that_is_no_class_raises(objective, label):
    z, y = torch.randn(4, 5), torch.tensor([0, 1, 2, label])
    with pytest.raises((IndexError, RuntimeError)):
        losses.ce(z, y) if objective == "ce" else OF_TWO[objective](z, z, y)


@pytest.mark.parametrize("temperatures", [(), (0.0,), (4.0, -1.0), (math.nan,), (math.inf,)])
def test_temperatures_that_are_none_raise(temperatures):
    z, y = torch.randn(4, 5), Y
    with pytest.raises(ValueError, match="temperatures must be"):
        losses.kd(z, z, y, temperatures=temperatures)
