"""What two runs must share before their numbers may stand in one table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from recbole.utils import ModelType

from recbole_mm.checkpoint import fingerprint
from recbole_mm.config_rules import drawing_mode
from recbole_mm.errors import InputError

if TYPE_CHECKING:
    from recbole.data.dataset import Dataset

    from recbole_mm.config import Config


@dataclass(frozen=True)
class Protocol:
    """How a run is evaluated, and on what.

    The fingerprints are hashes over tokens, not over internal ids, so that they can be compared
    between models, data set classes and id orders.

    Attributes:
        split: RecBole's split, such as ``LS valid_and_test``, or the names of files that come
            split.
        order: ``TO`` (by exact time) or ``RO``; ``as given`` of files that come split.
        mode: RecBole's evaluation mode of valid and test, ``full`` for the whole catalogue.
        mask_history: Whether items of a user's past are no candidates. Of drawn candidates the
            model decides: RecBole draws the past for sequential models and not for general ones.
        metrics: Names.
        topk: Cut-offs.
        valid_metric: What selects the epoch, on validation.
        decimal_places: Of the metrics.
        candidates: Number of items that are ranked.
        items: Fingerprint of the candidate items.
        train: Fingerprint of the training interactions, as (user, item) pairs.
        valid: The same for validation.
        test: The same for test.
        valid_users: Number of users in validation.
        test_users: Number of users in test.
        valid_rankings: How many rankings the validation metrics are means of: a sequential model
            ranks for each held-out interaction, a general one once for all of a user.
        test_rankings: The same for test.
    """

    split: str
    order: str
    mode: str
    mask_history: bool
    metrics: tuple[str, ...]
    topk: tuple[int, ...]
    valid_metric: str
    decimal_places: int
    candidates: int
    items: str
    train: str
    valid: str
    test: str
    valid_users: int
    test_users: int
    valid_rankings: int
    test_rankings: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Protocol:
        """The protocol that :meth:`as_dict` has made plain.

        Raises:
            InputError: If it was written by a version that did not count rankings, and they matter.
        """
        plain: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        if "test_rankings" not in plain and not str(plain["split"]).startswith("LS"):
            raise InputError(
                f"a run with split {plain['split']} was made before rankings were counted, and "
                "cannot be compared; run it again, into another folder"
            )
        for part in ("valid", "test"):  # leave-one-out has one for each user
            plain.setdefault(f"{part}_rankings", plain[f"{part}_users"])
        return cls(**plain)

    def line(self) -> str:
        """One line for the terminal."""
        by = f"selected by {self.valid_metric} on validation"
        if not self.valid_users:
            by = "the last epoch"
        history = "history masked" if self.mask_history else "history not masked"
        return (
            f"protocol: split {self.split}, order {self.order}, ranking {self.mode} over "
            f"{self.candidates} items, {history}; {self.valid_users} validation and "
            f"{self.test_users} test users{self._rankings()}; {by}; "
            f"fingerprints items {self.items} train {self.train} valid {self.valid} "
            f"test {self.test}"
        )

    def _rankings(self) -> str:
        """How often is ranked, where that is not once for each user."""
        if (self.valid_rankings, self.test_rankings) == (self.valid_users, self.test_users):
            return ""
        return f", ranked {self.valid_rankings} and {self.test_rankings} times"


def describe(config: Config, parts: tuple[Dataset, Dataset, Dataset]) -> Protocol:
    """The protocol of a run.

    Args:
        config: The resolved configuration.
        parts: Train, validation and test data sets, as RecBole's ``build`` returns them.
    """
    train, valid, test = parts
    uid, iid = train.uid_field, train.iid_field
    users, items = train.field2id_token[uid], train.field2id_token[iid]

    def pairs(part: Dataset) -> tuple[str, int]:
        if part is train:
            matrix = part.inter_matrix(form="coo")
            user_ids, item_ids = matrix.row, matrix.col
        else:
            user_ids, item_ids = (part.inter_feat[field].numpy() for field in (uid, iid))
        tokens = sorted(f"{users[u]}\t{items[i]}" for u, i in zip(user_ids, item_ids, strict=True))
        return fingerprint(tokens)[:12], len(set(user_ids.tolist()))

    train_print, _ = pairs(train)
    valid_print, valid_users = pairs(valid)
    test_print, test_users = pairs(test)
    arguments = config["eval_args"]
    modes = arguments["mode"]

    def n_rankings(part: Dataset, n_users: int, mode: str) -> int:
        by_row = config["MODEL_TYPE"] == ModelType.SEQUENTIAL or mode == "labeled"
        return len(part.inter_feat) if by_row else n_users

    return Protocol(
        split=_split_text(config),
        order="as given" if config["benchmark_filename"] else arguments["order"],
        mode=modes["test"]
        if modes["valid"] == modes["test"]
        else f"{modes['valid']}/{modes['test']}",
        mask_history=_is_history_masked(config),
        metrics=tuple(config["metrics"]),
        topk=tuple(config["topk"]),
        valid_metric=config["valid_metric"],
        decimal_places=config["metric_decimal_place"],
        candidates=len(items) - 1,
        items=fingerprint(sorted(str(token) for token in items[1:]))[:12],
        train=train_print,
        valid=valid_print,
        test=test_print,
        valid_users=valid_users,
        test_users=test_users,
        valid_rankings=n_rankings(valid, valid_users, modes["valid"]),
        test_rankings=n_rankings(test, test_users, modes["test"]),
    )


def _is_history_masked(config: Config) -> bool:
    if drawing_mode(config.final_config_dict) is None:
        return bool(config["mask_history"])
    return not config["repeatable"]


def _split_text(config: Config) -> str:
    parts = config["benchmark_filename"]
    if parts:
        return f"in files {', '.join(parts)}"
    text = " ".join(f"{key} {value}" for key, value in config["eval_args"]["split"].items())
    cold = config["cold_items"]
    return f"{text}, newest {cold:g} % of the items cold" if cold else text


def assert_comparable(first: Protocol, second: Protocol) -> None:
    """Refuse to compare runs of different items, interactions, splits or rules.

    Raises:
        InputError: Naming every field that differs, with both values.
    """
    one, two = first.as_dict(), second.as_dict()
    differing = [f"{key}: {one[key]!r} and {two[key]!r}" for key in one if one[key] != two[key]]
    if differing:
        raise InputError(
            "these runs cannot share a table, they differ in "
            + "; ".join(differing)
            + ": run both with the same data set files and evaluation keys"
        )
