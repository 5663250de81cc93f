import torch
from torch.testing import assert_close

from recbole_mm.ops.packing import Packing

LENGTH = torch.tensor([3, 0, 5, 1])
L = 5
PLACES = [(b, j) for b in range(4) for j in range(int(LENGTH[b]))]


def test_real_positions_come_row_by_row():
    x = torch.randn(4, L, 2, 3)
    packed = Packing(LENGTH, L).pack(x)
    assert packed.shape == (len(PLACES), 2, 3)
    assert all(torch.equal(packed[t], x[b, j]) for t, (b, j) in enumerate(PLACES))


def test_a_position_is_the_place_in_its_row():
    assert Packing(LENGTH, L).position.tolist() == [j for _, j in PLACES]


def test_padding_restores_the_places_and_is_zero_elsewhere():
    packing = Packing(LENGTH, L)
    x = torch.randn(4, L, 3)
    assert_close(packing.pad(packing.pack(x)), x * packing.real[..., None])


def test_an_inner_dimension_is_padded_like_the_first():
    packing = Packing(LENGTH, L)
    x = torch.randn(2, len(PLACES), 3)
    assert torch.equal(packing.pad(x, dim=1), torch.stack([packing.pad(v) for v in x]))


def test_masks_are_padded_with_false():
    packing = Packing(LENGTH, L)
    assert torch.equal(packing.pad(torch.ones(len(PLACES), dtype=torch.bool)), packing.real)


def test_padding_has_no_influence_and_no_gradient():
    packing = Packing(LENGTH, L)
    x = torch.randn(4, L, 3)
    x[~packing.real] = torch.nan
    x.requires_grad_()
    packed = packing.pack(x)
    assert packed.isfinite().all()
    packed.sum().backward()
    assert_close(x.grad, packing.real[..., None].float().expand_as(x))


def test_gradients_are_right():
    packing = Packing(LENGTH, L)
    packed = torch.randn(2, len(PLACES), 2, dtype=torch.float64, requires_grad=True)
    padded = torch.randn(4, L, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: packing.pad(x, dim=1) ** 2, packed)
    assert torch.autograd.gradcheck(lambda x: packing.pack(x) ** 2, padded)


def test_a_batch_of_empty_rows_packs_to_nothing():
    packing = Packing(torch.zeros(3, dtype=torch.int64), L)
    assert packing.pack(torch.randn(3, L, 2)).shape == (0, 2)
    assert torch.equal(packing.pad(torch.zeros(0, 2)), torch.zeros(3, L, 2))
