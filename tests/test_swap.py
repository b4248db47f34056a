"""(S1), sorting, GA and `misclassified`: the worked examples, the properties, and plain-Python
oracles."""
import pytest
import torch

from losses import standardize
from swap import add_to_target, misclassified, sort_to_target, swap

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def cases(dtype=torch.float32, n=200):
    for C in (2, 3, 10, 100):
        yield (3 * torch.randn(n, C)).to(dtype), torch.randint(C, (n,))


def swap_in_plain_python(rows, target):
    out = []
    for row, y in zip(rows, target):
        row = list(row)
        m = row.index(max(row))
        row[m], row[y] = row[y], row[m]
        out.append(row)
    return out


def sort_in_plain_python(rows, target):
    """The label climbs a rank at a time: it changes places with the lowest class above it."""
    out = []
    for row, y in zip(rows, target):
        row = list(row)
        while above := [c for c in range(len(row)) if row[c] > row[y]]:
            # Of equal ones the last.
            lowest = min(reversed(above), key=lambda c: row[c])
            row[y], row[lowest] = row[lowest], row[y]
        out.append(row)
    return out


def test_the_docstring_examples():
    logits = torch.tensor([[2., 9., 5.]])
    assert swap(logits, torch.tensor([2])).tolist() == [[2., 5., 9.]]
    logits, target = torch.tensor([[9., 7., 2., 5.]]), torch.tensor([3])
    assert sort_to_target(logits, target).tolist() == [[7., 5., 2., 9.]]
    assert swap(logits, target).tolist() == [[5., 7., 2., 9.]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_swap_is_the_plain_python_swap(dtype):
    for logits, target in cases(dtype):
        result = swap(logits, target)
        assert result.dtype == dtype
        assert result.tolist() == swap_in_plain_python(logits.tolist(), target.tolist())


@pytest.mark.parametrize("dtype", DTYPES)
def test_sort_is_the_plain_python_climb(dtype):
    # The second kind of row is full of ties.
    for logits, target in [*cases(dtype), *((z.round(), y) for z, y in cases(dtype))]:
        result = sort_to_target(logits, target)
        assert result.dtype == dtype
        assert result.tolist() == sort_in_plain_python(logits.tolist(), target.tolist())


@pytest.mark.parametrize("repair", [swap, sort_to_target])
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_permute_a_row_and_the_target_ends_largest(dtype, repair):
    for logits, target in cases(dtype):
        # Up to the largest numbers that float16 has.
        for scale in (1, 4000):
            z = scale * logits
            result = repair(z, target)
            assert torch.equal(result.sort(1).values, z.sort(1).values)
            assert torch.equal(result.gather(1, target[:, None])[:, 0], z.amax(1))
            assert not misclassified(result, target).any()
            right = ~misclassified(z, target)
            assert torch.equal(result[right], z[right])


def test_a_swap_moves_two_classes():
    for logits, target in cases():
        moved = (swap(logits, target) != logits).sum(1)
        assert torch.equal(moved, 2 * misclassified(logits, target))


def ranks(logits):
    """(B, C): 1 for the largest of a row."""
    return 1 + logits.argsort(1, descending=True).argsort(1)


@pytest.mark.parametrize("rank", [1, 2, 3, 41, 100])
def test_a_label_far_down_moves_one_class_far_or_many_by_one_rank(rank):
    logits = torch.stack([torch.randperm(100).double() for _ in range(50)])
    before = ranks(logits)
    target = (before == rank).int().argmax(1)
    is_label, is_top = before == rank, before == 1
    expected = torch.where(before < rank, before + 1, before).masked_fill(is_label, 1)
    assert torch.equal(ranks(sort_to_target(logits, target)), expected)
    expected = before.masked_fill(is_top, rank).masked_fill(is_label, 1)
    assert torch.equal(ranks(swap(logits, target)), expected)


def test_sort_is_the_swap_where_the_label_is_second():
    for logits, _ in cases(torch.float64):
        second = logits.topk(2).indices[:, 1]
        assert torch.equal(sort_to_target(logits, second), swap(logits, second))


@pytest.mark.parametrize("repair", [swap, sort_to_target])
def test_both_commute_with_the_softmax_at_any_temperature_and_with_standardize(repair):
    for logits, target in cases(torch.float64):
        repaired = repair(logits, target)
        for T in (1, 4):
            torch.testing.assert_close((repaired / T).softmax(1),
                                       repair((logits / T).softmax(1), target), rtol=1e-12, atol=0)
        torch.testing.assert_close(standardize(repaired), repair(standardize(logits), target),
                                   rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("repair, third", [(swap, [40., 20., 30., 10.]),
                                           (sort_to_target, [20., 30., 40., 10.])])
def test_inputs_stay_and_gradient_follows_the_values(repair, third):
    logits = torch.tensor([[1., 7., 3., 0.], [5., 2., 1., 0.], [3., 5., 7., 9.]],
                          requires_grad=True)
    target = torch.tensor([2, 0, 0])
    before = logits.detach().clone()
    repair(logits, target).backward(torch.tensor([[10., 20., 30., 0.], [1., 2., 3., 4.],
                                                  [10., 20., 30., 40.]]))
    assert torch.equal(logits.detach(), before)
    assert logits.grad.tolist() == [[10., 30., 20., 0.], [1., 2., 3., 4.], third]
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 1, 2, 3, 0, 1])
    assert torch.autograd.gradcheck(lambda z: repair(z, target), logits)
    assert torch.autograd.gradcheck(lambda z: add_to_target(z, target, 2.0), logits)


def test_ties_are_harmless_and_count_as_right():
    logits, target = torch.tensor([[4., 1., 4.], [2., 2., 2.]]), torch.tensor([2, 1])
    assert torch.equal(swap(logits, target), logits)
    assert torch.equal(sort_to_target(logits, target), logits)
    assert misclassified(logits, target).tolist() == [False, False]


def test_misclassified_is_an_argmax_that_is_not_the_label():
    for logits, target in cases(torch.float64):
        assert torch.equal(misclassified(logits, target), logits.argmax(1) != target)


def test_add_to_target_adds_to_the_label_and_nowhere_else():
    for logits, target in cases():
        added = add_to_target(logits, target, 2.5) - logits
        expected = torch.zeros_like(logits)
        expected[torch.arange(len(target)), target] = 2.5
        torch.testing.assert_close(added, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_outside_the_classes_raises(label):
    for function in (swap, sort_to_target, misclassified, lambda z, y: add_to_target(z, y, 1.0)):
        with pytest.raises((RuntimeError, IndexError)):
            function(torch.zeros(1, 3), torch.tensor([label]))
