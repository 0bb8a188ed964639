"""Threads of the complete search: order, exceptions, no thread within a thread, and the same answers."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

import flowverify as fv
from flowverify.certifiers.complete.certifier import CompleteCertifier
from flowverify.certifiers.complete.problem import Workers
from flowverify.certifiers.options import DEFAULTS, CompleteOptions, SearchSettings


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_parts_are_done_at_the_same_time_and_come_back_in_order(two_threads: None) -> None:
    both, own = threading.Barrier(2), Workers()

    def meet(part: int) -> tuple[int, int]:
        both.wait()
        return part, own.count

    with own:
        assert own.count == 2
        assert torch.get_num_threads() == 1
        assert own.each(meet, [3, 5]) == [(3, 1), (5, 1)], "within a thread nothing is shared out again"
    assert torch.get_num_threads() == 2
    assert own.count == 1


def test_an_exception_comes_out_when_all_have_ended(two_threads: None) -> None:
    ended = []

    def work(part: int) -> None:
        if part == 1:
            raise ValueError("part 1")
        ended.append(part)

    with pytest.raises(ValueError, match="part 1"), Workers() as own:
        own.each(work, [0, 1, 2, 3])
    assert sorted(ended) == [0, 2, 3]
    assert torch.get_num_threads() == 2


def test_rows_are_divided_among_the_threads(two_threads: None) -> None:
    rows, own = torch.arange(100), Workers()
    assert [len(part) for part in own.parts(rows, 40)] == [34, 33, 33]
    with own:
        assert torch.cat(own.parts(rows, 1000)).equal(rows)
        assert len(own.parts(rows, 1000)) == 2
        assert len(own.parts(rows[:5], 1000)) == 1
        assert torch.cat(own.dealt(100)).sort().values.equal(rows)
    assert own.parts(rows[:0], 10) == []


def exact_radii(settings: SearchSettings = DEFAULTS, tolerance: float = 1e-2) -> list[float]:
    data = fv.load_dataset("digits")[1:3]
    certifier = CompleteCertifier(
        fv.load_model("digits-fc3"), options=CompleteOptions(None, tolerance=tolerance, settings=settings)
    )
    found = certifier.search(data.images, data.labels)
    assert all(
        one.upper_radius is not None and one.upper_radius <= one.radius * (1 + 1.01 * tolerance) for one in found
    )
    return [one.radius for one in found]


def test_two_threads_find_the_same_radii(two_threads: None) -> None:
    together = exact_radii()
    torch.set_num_threads(1)
    assert together == pytest.approx(exact_radii(), rel=1e-2)


def test_without_compiled_kernels_it_finds_the_same_radii() -> None:
    """What runs on a graphics card, on the CPU."""
    assert exact_radii(SearchSettings(compiled=False)) == pytest.approx(exact_radii(), rel=1e-2)
