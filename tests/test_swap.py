"""(S1), GA and `misclassified`: the worked example, the properties, and a plain-Python oracle."""
import pytest
import torch

from losses import standardize
from swap import add_to_target, misclassified, swap

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


def test_the_docstring_example():
    logits = torch.tensor([[2., 9., 5.]])
    assert swap(logits, torch.tensor([2])).tolist() == [[2., 5., 9.]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_swap_is_the_plain_python_swap(dtype):
    for logits, target in cases(dtype):
        result = swap(logits, target)
        assert result.dtype == dtype
        assert result.tolist() == swap_in_plain_python(logits.tolist(), target.tolist())


@pytest.mark.parametrize("dtype", DTYPES)
def test_swap_permutes_and_the_target_ends_largest(dtype):
    for logits, target in cases(dtype):
        result = swap(logits, target)
        assert torch.equal(result.sort(1).values, logits.sort(1).values)
        assert torch.equal(result.gather(1, target[:, None])[:, 0], logits.amax(1))
        assert not misclassified(result, target).any()
        right = ~misclassified(logits, target)
        assert torch.equal(result[right], logits[right])
        assert ((result != logits).sum(1) == 2 * misclassified(logits, target)).all()


def test_swap_commutes_with_the_softmax_at_any_temperature():
    for logits, target in cases(torch.float64):
        for T in (1, 4):
            torch.testing.assert_close((swap(logits, target) / T).softmax(1),
                                       swap((logits / T).softmax(1), target), rtol=1e-12, atol=0)


def test_swap_commutes_with_standardize():
    for logits, target in cases(torch.float64):
        torch.testing.assert_close(standardize(swap(logits, target)),
                                   swap(standardize(logits), target), rtol=1e-12, atol=1e-12)


def test_inputs_stay_and_gradient_follows_the_exchange():
    logits = torch.tensor([[1., 7., 3.], [5., 2., 1.]], requires_grad=True)
    target = torch.tensor([2, 0])
    before = logits.detach().clone()
    swap(logits, target).backward(torch.tensor([[10., 20., 30.], [1., 2., 3.]]))
    assert torch.equal(logits.detach(), before)
    assert logits.grad.tolist() == [[10., 30., 20.], [1., 2., 3.]]
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 1, 2, 3, 0, 1])
    assert torch.autograd.gradcheck(lambda z: swap(z, target), logits)
    assert torch.autograd.gradcheck(lambda z: add_to_target(z, target, 2.0), logits)


def test_ties_are_harmless_and_count_as_right():
    logits, target = torch.tensor([[4., 1., 4.], [2., 2., 2.]]), torch.tensor([2, 1])
    assert torch.equal(swap(logits, target), logits)
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
    for function in (swap, misclassified, lambda z, y: add_to_target(z, y, 1.0)):
        with pytest.raises((RuntimeError, IndexError)):
            function(torch.zeros(1, 3), torch.tensor([label]))
