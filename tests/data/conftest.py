"""A data set in a temporary folder, and RecBole's configuration of it."""

from __future__ import annotations

import copy
import functools

import pytest
import yaml
from recbole.config import Config as RecBoleConfig

from recbole_mm import compat


@functools.cache
def _properties(file, loader):
    with open(file, encoding="utf-8") as text:  # noqa: PTH123  (RecBole hands over a string)
        return yaml.load(text, Loader=loader)  # noqa: S506


class Config(RecBoleConfig):
    """RecBole's own, deaf to the arguments of pytest and able to start with numpy 2."""

    def compatibility_settings(self):
        compat.set_numpy_names()

    def _load_cmd_line(self):
        return {}

    def _update_internal_config_dict(self, file):
        """As RecBole's, but a file is parsed once: that is half of the time of a test."""
        values = copy.deepcopy(_properties(file, self.yaml_loader))
        self.internal_config_dict.update(values or {})
        return values


def table(header, rows):
    """The text of an atomic file."""
    lines = ["\t".join(header.split()), *("\t".join(map(str, row)) for row in rows)]
    return "\n".join(lines) + "\n"


@pytest.fixture
def make(tmp_path):
    """Write ``toy.<end>`` files and return a function ``(model, **keys) -> Config``."""

    def write(**files):
        folder = tmp_path / "toy"
        folder.mkdir(exist_ok=True)
        for end, content in files.items():
            text = content if isinstance(content, str) else table(*content)
            (folder / f"toy.{end.replace('_', '.')}").write_bytes(text.encode())

        def config(model="SASRec", **keys):
            sequential = model in ("SASRec", "FEARec", "SASRecF", "GRU4Rec", "DIEN", "KSR")
            values = {
                "data_path": str(tmp_path),
                "use_gpu": False,
                "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
                "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
                "train_batch_size": 16,
                "eval_batch_size": 16,
                "MAX_ITEM_LIST_LENGTH": 4,
                "metrics": ["NDCG"],
                "valid_metric": "NDCG@10",
                **({"train_neg_sample_args": None, "loss_type": "CE"} if sequential else {}),
                **keys,
            }
            return Config(model, "toy", config_dict=values)

        return config

    return write
