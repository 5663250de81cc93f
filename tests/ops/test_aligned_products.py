"""Scores of all items in aligned rows: the same numbers, whatever a model does with them next."""

import pytest
import torch

from recbole_mm.ops.aligned_products import AlignedProducts, aligned_rows

N_ITEMS, N_USERS, WIDTH = 121, 7, 16
PRODUCTS = {
    "matmul": torch.matmul,
    "mm": torch.mm,
    "operator": lambda users, items: users @ items,
    "method": lambda users, items: users.matmul(items),
}


@pytest.fixture
def vectors():
    torch.manual_seed(0)
    return torch.randn(N_USERS, WIDTH), torch.randn(N_ITEMS, WIDTH)


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
@torch.no_grad()
def test_a_product_with_all_items_has_aligned_rows(product, vectors):
    users, items = vectors
    with AlignedProducts(N_ITEMS):
        scores = product(users, items.T)
    torch.testing.assert_close(scores, users @ items.T)
    assert scores.shape == (N_USERS, N_ITEMS)
    assert scores.stride() == (128, 1)


@torch.no_grad()
def test_what_is_done_with_the_scores_is_done(vectors):
    users, items = vectors
    plain = users @ items.T
    with AlignedProducts(N_ITEMS):
        scores = users @ items.T
        results = [scores.view(-1), scores.view(N_USERS, N_ITEMS), scores.softmax(1), scores + 1]
        results += [scores.view(-1, 1), scores.view((1, -1)), scores.view(torch.int32)]
        two = (scores, users @ items.T)  # one does not overwrite the other
    expected = [plain.view(-1), plain, plain.softmax(1), plain + 1]
    expected += [plain.view(-1, 1), plain.view(1, -1), scores.view(torch.int32)]
    torch.testing.assert_close(results, expected)
    torch.testing.assert_close(two, (plain, plain))


@torch.no_grad()
def test_other_products_are_left_alone(vectors):
    users, items = vectors
    with AlignedProducts(N_ITEMS):
        others = [
            users @ items[:50].T,  # not all items
            users[None] @ items.T,  # three dimensions
            users[0] @ items.T,
            torch.matmul(users.double(), items.double().T),
        ]
        with torch.autocast("cpu", torch.bfloat16):
            half = users @ items.T
        with torch.enable_grad():
            trained = users.requires_grad_() @ items.T
    assert [other.is_contiguous() for other in others] == [True, True, True, False]
    assert others[3].dtype == torch.float64
    assert half.dtype == torch.bfloat16
    assert half.is_contiguous()
    assert trained.requires_grad
    assert trained.is_contiguous()


@torch.no_grad()
def test_a_view_stays_a_view():
    table = torch.zeros(N_USERS, N_ITEMS)
    with AlignedProducts(N_ITEMS):
        table.view(-1)[3] = 1.0
    assert table[0, 3] == 1


@torch.no_grad()
def test_a_sparse_product_is_left_alone(vectors):
    items = vectors[1]
    graph = torch.eye(N_ITEMS).to_sparse()
    with AlignedProducts(items.size(1)):  # as wide as the catalogue is long
        found = torch.mm(graph, items)
    torch.testing.assert_close(found, items)


def test_rows_that_fit_have_no_gap():
    assert aligned_rows(torch.zeros(1), 3, 128).is_contiguous()
    assert aligned_rows(torch.zeros(1), 3, 129).stride() == (192, 1)
