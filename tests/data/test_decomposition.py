"""Truncated SVD against numpy's, and its determinism."""

import numpy as np
import pytest
import scipy.sparse as sp

from recbole_mm.data import decomposition
from recbole_mm.data.decomposition import decompose


@pytest.mark.parametrize("largest_dense", [0, 2048])
@pytest.mark.parametrize("shape", [(40, 25), (25, 40)])
def test_decomposition_agrees_with_numpys(shape, largest_dense, monkeypatch):
    monkeypatch.setattr(decomposition, "_DENSE", largest_dense)
    rng = np.random.default_rng(0)
    matrix = rng.random(shape) * (rng.random(shape) < 0.3)
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    sign = np.sign(vt[np.arange(7), np.abs(vt[:7]).argmax(axis=1)])
    scores = u[:, :7] * s[:7] * sign
    expected = scores / np.linalg.norm(scores, axis=1, keepdims=True)
    for form in (matrix, sp.csr_matrix(matrix)):
        values, explained = decompose(form, 7, "m")
        assert values == pytest.approx(expected, abs=1e-5)
        assert explained == pytest.approx(scores.var(axis=0).sum() / matrix.var(axis=0).sum())


def test_equal_singular_values_give_the_same_answer_every_time():
    blocks = sp.csr_matrix(np.kron(np.eye(10), np.ones((2, 2))))
    first, second = (decompose(blocks, 4, "m")[0] for _ in range(2))
    assert (first == second).all()


def test_lanczos_begins_at_the_same_vector_every_time(monkeypatch):
    monkeypatch.setattr(decomposition, "_DENSE", 0)
    matrix = sp.csr_matrix(np.random.default_rng(0).random((90, 70)))
    first, second = (decomposition._singular_vectors(matrix, 5)[0] for _ in range(2))
    assert (first == second).all()


@pytest.mark.parametrize("largest_dense", [0, 2048])
def test_all_components_hold_all_variance(largest_dense, monkeypatch):
    monkeypatch.setattr(decomposition, "_DENSE", largest_dense)
    matrix = np.random.default_rng(0).random((6, 4))
    values, explained = decompose(sp.csr_matrix(matrix), 4, "m")
    assert values.shape == (6, 4)
    assert explained == pytest.approx(1)
