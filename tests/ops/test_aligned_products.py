"""Scores of all items by aligned products: the same numbers, and what is not scores left alone."""

import pytest
import torch

from recbole_mm.ops import aligned_products
from recbole_mm.ops.aligned_products import AlignedProducts, aligned_rows, product

N_ITEMS, N_USERS, WIDTH = 121, 17, 16
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


@pytest.fixture
def made(monkeypatch):
    """Shapes of the products that were made here."""
    shapes = []

    def noted(left, right):
        shapes.append((left.size(0), right.size(1)))
        return product(left, right)

    monkeypatch.setattr(aligned_products, "product", noted)
    return shapes


@pytest.mark.parametrize("n_columns", [1, 63, 64, 65, 127, 128, 129, 1_000])
@pytest.mark.parametrize("tile", [1, 64 * 5, 1 << 18])
@torch.no_grad()
def test_a_product_in_pieces_is_the_product(tile, n_columns, monkeypatch):
    monkeypatch.setattr(aligned_products, "_TILE", tile)
    torch.manual_seed(0)
    left = torch.randn(5, 8, dtype=torch.float64)
    right = torch.randn(n_columns, 8, dtype=torch.float64)
    found = product(left, right.T)
    torch.testing.assert_close(found, torch.einsum("bd,nd->bn", left, right), rtol=0, atol=1e-12)
    assert found.is_contiguous()


@pytest.mark.parametrize("scores", PRODUCTS.values(), ids=PRODUCTS)
@torch.no_grad()
def test_a_product_with_all_items_is_made_here(scores, vectors, made):
    users, items = vectors
    with AlignedProducts(N_ITEMS):
        found = scores(users, items.T)
    torch.testing.assert_close(found, users @ items.T)
    assert made == [(N_USERS, N_ITEMS)]
    assert found.is_contiguous()


@torch.no_grad()
def test_what_is_done_with_the_scores_is_done(vectors, made):
    users, items = vectors
    plain = users @ items.T
    with AlignedProducts(N_ITEMS):
        scores = users @ items.T
        results = [scores.view(-1), scores.view(N_USERS, N_ITEMS), scores.softmax(1), scores + 1]
        results += [scores.view(-1, 1), scores.view((1, -1)), scores.view(torch.int32)]
        two = (scores, users @ items.T)  # one does not overwrite the other
        double = torch.matmul(users.double(), items.double().T)
    assert len(made) == 3
    expected = [plain.view(-1), plain, plain.softmax(1), plain + 1]
    expected += [plain.view(-1, 1), plain.view(1, -1), scores.view(torch.int32)]
    torch.testing.assert_close(results, expected)
    torch.testing.assert_close(two, (plain, plain))
    assert double.dtype == torch.float64


@torch.no_grad()
def test_a_view_stays_a_view():
    table = torch.zeros(N_USERS, N_ITEMS)
    with AlignedProducts(N_ITEMS):
        table.view(-1)[3] = 1.0
    assert table[0, 3] == 1


@torch.no_grad()
def test_other_products_are_left_alone(vectors, made):
    users, items = vectors
    with AlignedProducts(N_ITEMS):
        others = [
            users @ items[:50].T,  # not all items
            users[None] @ items.T,  # three dimensions
            users[0] @ items.T,
            users[:15] @ items.T,  # few rows
        ]
        with torch.autocast("cpu", torch.bfloat16):
            half = users @ items.T
        with torch.enable_grad():
            trained = users.requires_grad_() @ items.T
    with AlignedProducts(64):
        others.append(users @ items[:64].T)  # fits as it is
    assert made == []
    assert all(other.is_contiguous() for other in others)
    assert half.dtype == torch.bfloat16
    assert half.is_contiguous()
    assert trained.requires_grad
    assert trained.is_contiguous()


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
