from __future__ import annotations

import pytest
import scipy.sparse as sp
import torch
from torch.testing import assert_close

from recbole_mm.ops.propagation import propagate
from tests.reference import mdsrec as reference

N, D = 9, 4


def graph(dtype=torch.float64, density=0.4):
    half = torch.rand(N, N, dtype=dtype) * (torch.rand(N, N) < density)
    dense = half + half.T
    dense[3], dense[:, 3] = 0, 0  # a node without an edge
    return dense


def csr(dense):
    matrix = sp.csr_matrix(dense.numpy())  # torch's own would use up the warning that is said once
    return (
        torch.from_numpy(matrix.indptr).long(),
        torch.from_numpy(matrix.indices).long(),
        torch.from_numpy(matrix.data),
    )


@pytest.mark.parametrize("n_layers", [0, 1, 3])
def test_equals_loop_reference_in_value_and_gradient(n_layers):
    dense = graph()
    x = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    ours = propagate(*csr(dense), x, n_layers)
    theirs = reference.propagate(dense, x, n_layers)
    assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    assert_close(
        torch.autograd.grad((ours * weight).sum(), x),
        torch.autograd.grad((theirs * weight).sum(), x),
    )


def test_gradient_is_right():
    dense = graph()
    x = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: propagate(*csr(dense), x, 2), (x,))


def test_node_without_an_edge_becomes_zero():
    y = propagate(*csr(graph()), torch.randn(N, D, dtype=torch.float64), 1)
    assert y[3].eq(0).all()


def test_graph_without_an_edge_gives_zeros():
    crow, col, weight = csr(torch.zeros(N, N))
    assert propagate(crow, col, weight, torch.randn(N, D), 1).eq(0).all()


def test_autocast_does_not_change_the_product():
    dense = graph(torch.float32)
    x = torch.randn(N, D, requires_grad=True)
    expected = propagate(*csr(dense), x, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        product = propagate(*csr(dense), x, 2)
        low = propagate(*csr(dense), x.bfloat16(), 2)
    assert_close(product, expected)
    assert low.dtype == torch.float32


def test_a_transposed_operand_is_fine():
    dense = graph()
    x = torch.randn(D, N, dtype=torch.float64).T
    assert_close(propagate(*csr(dense), x, 1), dense @ x)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=rf"x must be \({N}, D\), got \(2, 3\)"):
        propagate(*csr(graph()), torch.zeros(2, 3), 1)
    with pytest.raises(ValueError, match="at least 0, got -1"):
        propagate(*csr(graph()), torch.zeros(N, D), -1)
