import pytest
import torch
from torch.testing import assert_close

from recbole_mm.ops.rotary import rotate
from tests.reference.sparse_attention import rotated


def test_equals_the_loop():
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    positions = [0, 1, 2.5, 3, 100, 4095, 8191]
    assert_close(rotate(x, torch.tensor(positions)), rotated(x, positions), rtol=0, atol=1e-12)


def test_products_depend_on_distance_alone():
    q, k = torch.randn(2, 1, 8, dtype=torch.float64).unbind()
    at = lambda t: torch.tensor([t])  # noqa: E731
    near = (rotate(q, at(5)) * rotate(k, at(2))).sum()
    far = (rotate(q, at(8005)) * rotate(k, at(8002))).sum()
    assert_close(near, far, rtol=0, atol=1e-10)
    assert not torch.isclose(near, (rotate(q, at(6)) * rotate(k, at(2))).sum())


def test_position_zero_and_lengths_stay():
    x = torch.randn(3, 5, 4)
    assert torch.equal(rotate(x, torch.zeros(5)), x)
    assert_close(rotate(x, torch.arange(5)).norm(dim=-1), x.norm(dim=-1))


def test_rows_may_stand_at_different_positions():
    x = torch.randn(2, 3, 1, 4)  # (B, H, 1, d)
    position = torch.tensor([4, 9])
    both = rotate(x, position[:, None, None])
    for row, t in enumerate(position.tolist()):
        assert_close(both[row], rotate(x[row], torch.tensor([t])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_positions_are_as_exact_as_near_ones(dtype):
    x = torch.randn(1, 1, 32, dtype=torch.float64)
    t = torch.tensor([8191])
    error = (rotate(x.to(dtype), t).double() - rotate(x.to(dtype).double(), t)).abs().max()
    assert rotate(x.to(dtype), t).dtype == dtype
    assert error < 4 * torch.finfo(dtype).eps
