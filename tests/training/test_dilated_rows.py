"""Dilations in training: the reference dilation's values, and gradients that go to where values come from."""

import pytest
import torch
from torch import Tensor

from flowverify.training.bounds import _by_torch, _DilatedRows, dilate_rows, transport_costs
from flowverify.transport.dilation import dilate, lipschitz_constant

SHAPES = [(1, 1, 5, 7), (3, 2, 4, 6), (17, 1, 6, 6), (33, 3, 1, 8)]


def problem(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    rows = torch.randn(shape, generator=generator, dtype=dtype)
    return rows, lipschitz_constant(rows) * torch.rand(shape[0], generator=generator, dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sign", [1, -1])
class TestDilateRows:
    def test_is_the_reference_dilation(self, shape, sign):
        rows, multipliers = problem(shape)
        expected = dilate(sign * rows, multipliers)
        found = dilate_rows(rows, multipliers, sign)
        torch.testing.assert_close(found.rows, expected.value.flatten(1), rtol=0, atol=1e-12)

    def test_origins_explain_the_values(self, shape, sign):
        rows, multipliers = problem(shape)
        found = dilate_rows(rows, multipliers, sign)
        again = dilate_rows(rows, multipliers, sign, found.origins)
        torch.testing.assert_close(again.rows, found.rows, rtol=0, atol=1e-12)

    def test_old_origins_give_no_more_than_the_dilation(self, shape, sign):
        rows, _ = problem(shape)
        multipliers = torch.full((shape[0],), 0.2, dtype=rows.dtype)
        origins = dilate_rows(rows, multipliers, sign).origins
        moved = rows + 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=rows.dtype)
        stale, fresh = dilate_rows(moved, multipliers, sign, origins).rows, dilate_rows(moved, multipliers, sign).rows
        assert (stale <= fresh + 1e-12).all() and (stale < fresh - 1e-3).any()

    def test_gradient_is_that_of_differences(self, shape, sign):
        rows, multipliers = problem(shape)
        weights = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=rows.dtype).flatten(1)
        rows.requires_grad_(True)
        (dilate_rows(rows, multipliers, sign).rows * weights).sum().backward()
        step = 1e-7
        for row, pixel in ((0, 0), (shape[0] - 1, weights.shape[1] // 2)):
            ends = []
            for change in (step, -step):
                other = rows.detach().clone()
                other.flatten(1)[row, pixel] += change
                ends.append(float((dilate_rows(other, multipliers, sign).rows * weights).sum()))
            assert float(rows.grad.flatten(1)[row, pixel]) == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-5)

    def test_torch_does_what_the_compiled_kernel_does(self, shape, sign):
        rows, multipliers = problem(shape)
        value, origins = _by_torch(rows, multipliers, sign, None)
        compiled = dilate_rows(rows, multipliers, sign)
        torch.testing.assert_close(value, compiled.rows, rtol=0, atol=1e-12)
        again, _ = _by_torch(rows, multipliers, sign, origins)
        torch.testing.assert_close(again, value, rtol=0, atol=1e-12)
        image = torch.rand(shape[1:], generator=torch.Generator().manual_seed(3), dtype=rows.dtype)
        expected = dilate(sign * rows, multipliers).distance * image
        torch.testing.assert_close(transport_costs(compiled.origins, image), expected.flatten(1).sum(1))


def test_float32_is_kept() -> None:
    rows, multipliers = problem((5, 1, 6, 6), torch.float32)
    found = dilate_rows(rows, multipliers, 1)
    assert found.rows.dtype == torch.float32
    torch.testing.assert_close(found.rows, dilate(rows, multipliers).value.flatten(1))


def test_gradient_without_the_kernel_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, multipliers = problem((4, 2, 5, 5))
    weights = torch.rand(4, 50, dtype=rows.dtype)
    gradients = []
    for by_torch in (False, True):
        variable = rows.clone().requires_grad_(True)
        if by_torch:  # as on a device that the kernel does not run on
            monkeypatch.setattr("flowverify.training.bounds._compiled", _by_torch)
            forward = _DilatedRows.forward

            def on_device(ctx, *arguments, forward=forward):
                result = forward(ctx, *arguments)
                ctx.compiled = False
                return result

            monkeypatch.setattr(_DilatedRows, "forward", staticmethod(on_device))
        (dilate_rows(variable, multipliers, -1).rows * weights).sum().backward()
        gradients.append(variable.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-12)
