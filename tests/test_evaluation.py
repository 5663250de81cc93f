"""Evaluation: equal to RecBole's, unbiased in ties, bounded in memory; results of single users."""

import json

import numpy as np
import pytest

import recbole_mm
from recbole_mm.errors import InputError
from recbole_mm.evaluation import PerUser, per_user

# ------------------------------------------------------------------ results of single users


@pytest.mark.parametrize("name", ["SASRecFast", "BPR"])
def test_results_by_user_have_the_metrics_of_the_whole(name, build_trainer):
    values = {"metrics": "[Hit, MRR, NDCG, Recall, MAP, Precision]", "topk": "[3, 10]"}
    if name == "BPR":  # several targets a user
        values["eval_args"] = "{split: {RS: [6, 2, 2]}, order: TO, group_by: user, mode: full}"
    trainer, world = build_trainer(name, metric_decimal_place=12, **values)
    whole = trainer.evaluate(world.test, load_best_model=False)
    got = per_user(trainer, world.test, k=7)
    assert {key: got.metric(key).mean() for key in whole} == pytest.approx(whole, abs=1e-12)
    assert got.topk.shape == (len(got.users), 7)
    listed = got.ranks <= 7
    assert listed.any()
    np.testing.assert_array_equal(
        got.topk[got.rows[listed], got.ranks[listed] - 1], got.targets[listed]
    )
    assert not (got.topk[got.rows[~listed]] == got.targets[~listed, None]).any()


def test_a_model_alone_gives_the_same_results_by_user(build_trainer):
    trainer, world = build_trainer("SASRecFast")
    world.model.train()
    one, two = per_user(trainer, world.test), per_user(world.model, world.test)
    assert world.model.training
    for key, array in one.arrays().items():
        np.testing.assert_array_equal(array, two.arrays()[key])


def test_a_run_saves_the_results_of_its_test_users_when_asked(tmp_path):
    values = {
        "epochs": 1,
        "show_progress": False,
        "checkpoint_dir": str(tmp_path),
        "topk": [10],
    }
    plain = recbole_mm.run("SASRecFast", "tiny", config_dict=values)
    result = recbole_mm.run("SASRecFast", "tiny", config_dict={**values, "save_per_user": True})
    assert result["test_result"] == plain["test_result"]
    folder = tmp_path.__class__(result["run"])
    assert not (folder.parent / plain["run"] / "per_user.npz").exists()
    got = PerUser.load(folder / "per_user.npz")
    ids = json.loads((folder / "ids.json").read_text())
    assert got.items.tolist() == ids["item_id"]
    assert set(got.users) == set(ids["user_id"][1:])
    table = got.frame(["ndcg@10", "hit@10"])
    assert table["ndcg@10"].mean() == pytest.approx(result["test_result"]["ndcg@10"], abs=1e-6)
    assert table.loc[got.users[3], "hit@10"] == float(got.ranks[3] <= 10)


def test_results_by_user_refuse_what_they_cannot_read(tmp_path, build_trainer):
    (tmp_path / "other.npz").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(InputError, match=r"other\.npz.*save_per_user"):
        PerUser.load(tmp_path / "other.npz")
    trainer, world = build_trainer("SASRecFast")
    got = per_user(trainer, world.test)
    with pytest.raises(InputError, match=r"'ndgc@10' is no metric.*did you mean 'ndcg'"):
        got.metric("ndgc@10")
    got.save(tmp_path / "mine.npz")
    assert PerUser.load(tmp_path / "mine.npz").users.tolist() == got.users.tolist()
