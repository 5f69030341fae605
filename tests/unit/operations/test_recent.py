"""Percentiles: of values, and of a histogram's buckets."""

import math

import pytest

from app.operations.recent import Buckets, Slot, bucket_percentile, percentile, total

BUCKETS: Buckets = [(0.1, 50), (0.2, 90), (0.5, 100), (math.inf, 100)]


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([], 0.5, None),
        ([3.0], 0.99, 3.0),
        ([4.0, 1.0, 3.0, 2.0], 0.5, 2.0),
        (range(1, 101), 0.99, 99),
        ([1.0, 9.0], 1, 9.0),
    ],
)
def test_a_percentile_is_one_of_the_values(values: list[float], share: float, expected: float | None) -> None:
    """The smallest that this share of the values does not exceed."""
    assert percentile(values, share) == expected


@pytest.mark.parametrize(("share", "expected"), [(0.25, 0.05), (0.5, 0.1), (0.7, 0.15), (0.95, 0.35), (1.0, 0.5)])
def test_a_bucket_percentile_is_within_its_bucket(share: float, expected: float) -> None:
    """Interpolated, as `histogram_quantile` of Prometheus does."""
    assert bucket_percentile(BUCKETS, share) == pytest.approx(expected)


def test_beyond_the_last_bound_the_bound_is_returned() -> None:
    assert bucket_percentile([(0.1, 1), (0.2, 1), (math.inf, 4)], 0.99) == 0.2


@pytest.mark.parametrize("empty", [[], [(0.1, 0.0), (math.inf, 0.0)]])
def test_an_empty_histogram_has_none(empty: Buckets) -> None:
    assert bucket_percentile(empty, 0.5) is None


def test_histograms_add_up() -> None:
    """Slots that nobody watched, or that are unknown, add nothing."""
    slots = [None, Slot(), Slot(answers=[(0.1, 1), (math.inf, 2)]), Slot(answers=[(0.1, 3), (math.inf, 3)])]
    assert total(slots) == [(0.1, 4), (math.inf, 5)]
