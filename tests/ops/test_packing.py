import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from recbole_mm.ops import packing
from recbole_mm.ops.packing import Packing, by_length

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


# ------------------------------------------------------------------ rows of like length together


def row_by_row(x, length):
    """A stand-in for an encoder: every row by itself, real positions only."""
    real = torch.arange(x.size(1)) < length[:, None]
    return (x * real[..., None]).cumsum(1) * x.size(-1) + length[:, None, None]


def last_of(x, length):
    at = (length - 1).clamp(min=0)[:, None, None].expand(-1, 1, x.size(-1))
    return torch.where(length[:, None] > 0, row_by_row(x, length).gather(1, at).squeeze(1), 0.0)


@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=40),
    spare=st.integers(0, 5),
)
def test_grouping_by_length_changes_nothing(lengths, spare):
    length = torch.tensor(lengths)
    size = max(1, max(lengths)) + spare
    x = torch.randn(len(lengths), size, 2, dtype=torch.float64)
    real = Packing(length, size).real[..., None]
    assert_close(by_length(row_by_row, x, length) * real, row_by_row(x, length) * real)
    assert_close(by_length(last_of, x, length), last_of(x, length))


def test_gradients_pass_through_grouping():
    length = torch.tensor([300, 2, 0, 40, 310, 7, 200, 200])
    x = torch.randn(8, 310, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, 2, dtype=torch.float64)
    (grouped,) = torch.autograd.grad((by_length(last_of, x, length) * weight).sum(), x)
    (whole,) = torch.autograd.grad((last_of(x, length) * weight).sum(), x)
    assert_close(grouped, whole)


def test_rows_of_like_length_are_encoded_together():
    seen = []

    def note(x, length):
        seen.append((tuple(x.shape), length.tolist()))
        return x

    length = torch.tensor([10, 400, 9, 390, 10] + [10] * 60)
    by_length(note, torch.zeros(65, 400, 1), length)
    assert [shape for shape, _ in seen] == [(2, 400, 1), (63, 10, 1)]
    assert seen[0][1] == [400, 390]


def test_few_positions_are_not_worth_a_group():
    seen = []
    by_length(
        lambda x, n: seen.append(x.shape) or x, torch.zeros(3, 60, 1), torch.tensor([60, 2, 1])
    )
    assert [tuple(shape) for shape in seen] == [(3, 60, 1)]


def test_without_a_gradient_a_call_holds_a_bounded_number_of_positions(monkeypatch):
    monkeypatch.setattr(packing, "_MOST_POSITIONS", 1000)
    length = torch.tensor([400, 400, 390, 1200, 400, 5, 400])
    x = torch.randn(7, 1200, 2)
    shapes = []

    def note(x, length):
        shapes.append(tuple(x.shape[:2]))
        return last_of(x, length)

    with torch.no_grad():
        assert_close(by_length(note, x, length), last_of(x, length))
    assert shapes == [(1, 1200), (2, 400), (2, 400), (2, 390)]
    shapes.clear()
    by_length(note, x, length)
    assert shapes == [(1, 1200), (6, 400)]
