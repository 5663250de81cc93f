"""The gaps between RecBole and today's packages."""

import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from recbole.data import data_preparation

from recbole_mm import compat
from recbole_mm.config import Config
from recbole_mm.data.create import create_dataset
from recbole_mm.errors import EnvironmentFault


def test_anomaly_detection_is_off_after_a_sequential_model_is_imported():
    assert compat.import_model("SASRec").__name__ == "SASRec"
    assert not torch.is_anomaly_enabled()


def test_unknown_models_are_none_and_the_exlib_package_is_not_imported():
    assert compat.import_model("NoSuchModel") is None
    assert "recbole.model.exlib_recommender" not in sys.modules


def test_importing_the_package_leaves_ray_and_recboles_quick_start_alone():
    code = (
        "import sys, numpy, recbole_mm.quick_start;"
        "assert not {'ray', 'recbole.quick_start'} & set(sys.modules), 'imported';"
        "assert 'float' not in vars(numpy), 'numpy was changed at import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_graph_models_build_their_matrix_on_todays_scipy_without_a_patch():
    model = compat.import_model("LightGCN")
    stub = model.__new__(model)
    torch.nn.Module.__init__(stub)
    stub.n_users, stub.n_items = 2, 3
    stub.interaction_matrix = sp.coo_matrix(np.array([[1, 0, 1], [0, 1, 0]]))
    adjacency = stub.get_norm_adj_mat().to_dense()
    assert torch.equal(adjacency, adjacency.T)
    # user 0 has two items, item 0 has one user: 1 / sqrt(2 * 1)
    assert adjacency[0, 2].item() == pytest.approx(2**-0.5, rel=1e-5)
    assert not hasattr(sp.dok_matrix, "_update")


@pytest.mark.parametrize("options", [{}, {"train_neg_sample_args": None}])
def test_pop_counts_training_interactions_and_nothing_else(options):
    def counts(seed):
        config_dict = {**options, "train_batch_size": 64, "seed": seed, "show_progress": False}
        config = Config("Pop", "tiny", config_dict=config_dict)
        train, _, _ = data_preparation(config, create_dataset(config))
        model = config.model_class(config, train.dataset)
        for batch in train:
            model.calculate_loss(batch)
        items = train.dataset.inter_feat[config["ITEM_ID_FIELD"]]
        assert torch.equal(model.item_cnt[:, 0], torch.bincount(items, minlength=model.n_items))
        return model

    model = counts(1)
    assert int(model.max_cnt) == int(model.item_cnt.max()) > 1
    assert torch.equal(model.item_cnt, counts(2).item_cnt)


def test_pandas_3_is_refused_with_the_mend(monkeypatch):
    monkeypatch.setattr(compat, "version", lambda name: "3.0.1" if name == "pandas" else "1.2.1")
    with pytest.raises(EnvironmentFault, match="pip install 'pandas<3'"):
        compat.check_versions()


def test_working_directory_is_restored_after_an_error(tmp_path):
    before = compat.Path.cwd()
    with pytest.raises(KeyError), compat.working_directory(tmp_path):
        raise KeyError
    assert compat.Path.cwd() == before
