import pytest
import torch
from torch.testing import assert_close

from recbole_mm.ops.augmentation import swap, swap_mask

ALLOWED = torch.tensor([[True, True, False, True], [False, True, True, False]])


def test_the_places_of_the_mask_change_sides_and_no_others():
    first, second = torch.randn(2, 2, 4, 3)
    new_first, new_second = swap(first, second, ALLOWED)
    for b in range(2):
        for j in range(4):
            one, other = (second, first) if ALLOWED[b, j] else (first, second)
            assert torch.equal(new_first[b, j], one[b, j])
            assert torch.equal(new_second[b, j], other[b, j])


def test_swapping_twice_changes_nothing():
    first, second = torch.randn(2, 2, 4, 3)
    back = swap(*swap(first, second, ALLOWED), ALLOWED)
    assert torch.equal(back[0], first)
    assert torch.equal(back[1], second)


def test_a_gradient_goes_where_its_vector_came_from():
    first, second = torch.randn(2, 2, 4, 3, requires_grad=True)
    to_first, to_second = torch.autograd.grad(
        swap(first, second, ALLOWED)[0].sum(), [first, second]
    )
    assert_close(to_first, (~ALLOWED)[..., None].expand(-1, -1, 3).float())
    assert_close(to_second, ALLOWED[..., None].expand(-1, -1, 3).float())


def test_what_is_not_exchanged_cannot_poison_the_other_side():
    first, second = torch.randn(2, 2, 4, 3)
    second[~ALLOWED] = torch.nan
    assert swap(first, second, ALLOWED)[0].isfinite().all()


def test_a_mask_stays_where_a_swap_is_allowed():
    swappable = torch.rand(50, 40) < 0.3
    assert not (swap_mask(swappable, 0.9) & ~swappable).any()


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_the_extreme_ratios_are_exact(ratio):
    mask = swap_mask(torch.ones(100, 100, dtype=torch.bool), ratio)
    assert bool(mask.all()) == (ratio == 1)
    assert bool(mask.any()) == (ratio == 1)


@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_the_share_of_swaps_is_the_ratio(ratio):
    mask = swap_mask(torch.ones(200, 200, dtype=torch.bool), ratio)
    assert mask.float().mean().item() == pytest.approx(ratio, abs=0.01)  # 4 standard errors


def test_torchs_own_generator_decides():
    masks = []
    for global_seed in (1, 1, 2):
        torch.manual_seed(global_seed)
        masks.append(swap_mask(torch.ones(8, 8, dtype=torch.bool), 0.5))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_a_ratio_that_is_no_probability_is_refused(ratio):
    with pytest.raises(ValueError, match="swap_ratio must lie in"):
        swap_mask(ALLOWED, ratio)
