"""Where the samples are in a tensor, from a forward of one sample and one of two."""

from __future__ import annotations

import pytest
import torch

from qdiff.tracing.rows import TOLERANCE, Count, Rows, constant_or_count, rows_of_pair

ONE, OTHER = torch.arange(6.0).reshape(2, 3), torch.arange(6.0, 12.0).reshape(2, 3)  # two heads of a sample


def test_batch_first():
    assert rows_of_pair(ONE[:1], torch.stack([ONE[0], OTHER[0]])) == Rows()


def test_constants_have_no_rows():
    assert rows_of_pair(ONE, ONE.clone()) is None


@pytest.mark.parametrize(("dim", "samples_first"), [(0, True), (1, False)])
def test_several_rows_per_sample(dim, samples_first):
    """Heads of a mask: all of a sample together, or all samples of a head together."""
    rows = rows_of_pair(ONE, torch.stack([ONE, OTHER], dim=dim).flatten(0, 1))
    assert rows == Rows(2, samples_first)
    x = torch.randn(8, 5)
    by_sample = rows.by_sample(x)
    assert by_sample.shape == (4, 2, 5)
    assert torch.equal(by_sample[1], x[2:4] if samples_first else x[[1, 5]])
    assert torch.equal(rows.as_called(by_sample), x)


def test_samples_that_mix_are_found():
    with pytest.raises(ValueError, match="depends on what else is in the batch"):
        rows_of_pair(ONE[:1], torch.stack([ONE[0], OTHER[0]]) + OTHER.mean())
    with pytest.raises(ValueError, match="depends on what else is in the batch"):
        rows_of_pair(ONE, ONE + 1)  # a constant that is none


def test_samples_along_another_dimension_are_refused():
    with pytest.raises(ValueError, match=r"the shape \(3, 1\) for one sample and \(3, 2\) for two"):
        rows_of_pair(torch.randn(3, 1), torch.randn(3, 2))
    with pytest.raises(ValueError, match="the shape"):
        rows_of_pair(torch.randn(2, 3), torch.randn(3, 3))


def test_another_order_of_sums_is_the_same_value():
    one = torch.randn(1, 50)
    assert rows_of_pair(one, torch.cat([one + TOLERANCE / 10 * one.abs().max(), one])) == Rows()
    with pytest.raises(ValueError):
        rows_of_pair(one, torch.cat([one + 10 * TOLERANCE * one.abs().max(), one]))


def test_integers_are_equal_or_not():
    assert rows_of_pair(torch.tensor([5]), torch.tensor([5, 6])) == Rows()
    with pytest.raises(ValueError):
        rows_of_pair(torch.tensor([5_000_000]), torch.tensor([5_000_001, 5_000_000]))


def test_numbers_that_count_samples():
    assert constant_or_count(3, 6) == Count(3)
    for constant in (3, 0, None, "mode", True, 0.5, (2, 2)):
        assert constant_or_count(constant, constant) is None


@pytest.mark.parametrize(("one", "two"), [(3, 4), (0.5, 1.0), ("a", "b"), (False, True), ((1, 3), (2, 3)), (None, 1)])
def test_what_is_neither_constant_nor_count_is_refused(one, two):
    with pytest.raises(ValueError, match="for one sample and"):
        constant_or_count(one, two)


def test_an_object_with_tensors_inside_is_refused():
    class Output:
        def __init__(self):
            self.sample, self.name = torch.zeros(1), "x"

    with pytest.raises(ValueError, match="in an object of type Output"):
        constant_or_count(Output(), Output())
