"""RecBole's data sets on a floor that every model shares.

RecBole chooses a data set class by model. The classes here put the same floor under each of them,
so that a table can hold our models beside RecBole's:

- files are read by :mod:`recbole_mm.data.atomic`, which loses no row;
- users, items and interactions are those of ``.inter`` after the filters, whatever other files say;
- order and split follow the exact time, before RecBole rounds it to float32 (64 to 128 s for unix
  seconds), and equal times keep the order of the file;
- general models hold out the same interactions as sequential ones, but for ratios of rows (RS), of
  which a sequential model has one fewer for each user: such a table is refused by its fingerprints;
- :attr:`MultimodalDataset.report` says what is there and what was left out.

Keys of the configuration read here, besides RecBole's: ``on_bad_time``, ``mask_history``,
``category_field``, ``modalities``, ``min_coverage``, ``feature_cache_dir``, ``hidden_features``,
``cold_items``; and ``train_objective`` in :mod:`recbole_mm.data.sequential_dataset`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from recbole.data.dataset import Dataset, KnowledgeBasedDataset, SequentialDataset
from recbole.data.interaction import Interaction
from recbole.utils import FeatureSource, FeatureType
from torch import Tensor

from recbole_mm.data import splitting
from recbole_mm.data.atomic import AtomicTable, format_of, read_atomic, read_header
from recbole_mm.data.categories import CategoryTable
from recbole_mm.data.cold_start import newest_items
from recbole_mm.data.derive import resolve_declarations
from recbole_mm.data.features import FeatureTable, load_features
from recbole_mm.data.report import DataReport, FilterStep, PartCount
from recbole_mm.data.sequences import take
from recbole_mm.errors import InputError, nearest

_LOG = logging.getLogger(__name__)

_PARTS = ("train", "valid", "test")
_KNOWLEDGE_FIELDS = (
    *("ENTITY_ID_FIELD", "HEAD_ENTITY_ID_FIELD"),
    *("RELATION_ID_FIELD", "TAIL_ENTITY_ID_FIELD"),
)
_MISSING_TEXT = ("", "_")
_T = TypeVar("_T")


class MultimodalDataset(Dataset):
    """RecBole's ``Dataset``, reading, ordering and splitting as the module says.

    Attributes:
        report: Counts; those of the split are there after :meth:`build`.
        gathers_histories: Whether rows point at whole histories, of which the first interaction of
            a user is no row.

    Raises:
        InputError: If a file is missing or malformed, or the filters leave nothing.
    """

    report: DataReport
    gathers_histories = False
    inter_feat: Any  # a frame, then RecBole's Interaction

    def _from_scratch(self) -> None:
        sequential = isinstance(self, SequentialDataset)
        if self.config["mask_history"] and sequential and not self.gathers_histories:
            raise InputError(
                f"mask_history: True is not possible for {self.config['model']}, whose data set "
                "class keeps only the last items of a history; set mask_history: False"
            )
        super()._from_scratch()

    def _get_preset(self) -> None:
        super()._get_preset()
        self._format = format_of(self.config)
        self._steps: list[FilterStep] = []
        self._codes: dict[str, NDArray[np.int64]] = {}
        self._bad_times = 0
        self._is_cold: NDArray[np.bool_] | None = None
        self.left_out: tuple[Tensor, Tensor] | None = None  # users and items, of the training part
        self._items_without_row: int | None = None
        # shared by the parts of a split, which are shallow copies
        self._side_information: dict[str, Any] = {}

    def _set_alias(self, alias_name: str, default_value: list[Any]) -> None:
        """As RecBole; the lists of pre-split files hold items, whether the user says so or not."""
        if alias_name == "item_id" and self._list_field in self.field2type:
            default_value = [*default_value, self._list_field]
        super()._set_alias(alias_name, default_value)

    @property
    def _list_field(self) -> str | None:
        """Column of the histories in files that come split."""
        if self.config["benchmark_filename"] is None:
            return None
        return f"{self.iid_field}{self.config['LIST_SUFFIX']}"

    # ------------------------------------------------------------------ reading

    def _load_data(self, token: str, dataset_path: str) -> None:
        """Check that the files are there; RecBole would offer a download."""
        folder = Path(dataset_path)
        parts = [f"{part}.inter" for part in self.benchmark_filename_list or ()]
        wanted = [*(parts or ["inter"]), *(self.config["additional_feat_suffix"] or ())]
        if isinstance(self, KnowledgeBasedDataset):
            wanted += ["kg", "link"]
        missing = [f"{token}.{end}" for end in wanted if not (folder / f"{token}.{end}").is_file()]
        if missing:
            found = "no such folder"
            if folder.is_dir():
                names = sorted(path.name for path in folder.iterdir() if path.is_file())
                found = f"it holds {', '.join(names[:20]) or 'no files'}"
            raise InputError(
                f"data set {token!r}: looked in {folder} for {', '.join(missing)}; {found}; "
                "set data_path to the folder above that of the data set"
            )
        columns = self.config["load_col"]
        if isinstance(self, KnowledgeBasedDataset) and columns is not None:
            of_graph = {
                "kg": ("HEAD_ENTITY_ID_FIELD", "RELATION_ID_FIELD", "TAIL_ENTITY_ID_FIELD"),
                "link": ("ITEM_ID_FIELD", "ENTITY_ID_FIELD"),
            }
            for end in (end for end in of_graph if not columns.get(end)):
                fields = ", ".join(str(self.config[key]) for key in of_graph[end])
                raise InputError(
                    f"load_col: {self.config['model']} reads .{end} too; add {end}: [{fields}]"
                )
        super()._load_data(token, dataset_path)

    def _required_columns(self, source: FeatureSource | str) -> dict[str, str | None]:
        """Columns that a file must give, by the key that names them."""
        keys: dict[FeatureSource | str, tuple[str, ...]] = {
            FeatureSource.INTERACTION: ("USER_ID_FIELD", "ITEM_ID_FIELD"),
            FeatureSource.USER: ("USER_ID_FIELD",),
            FeatureSource.ITEM: ("ITEM_ID_FIELD",),
            FeatureSource.KG: ("HEAD_ENTITY_ID_FIELD", "RELATION_ID_FIELD", "TAIL_ENTITY_ID_FIELD"),
            "link": ("ITEM_ID_FIELD", "ENTITY_ID_FIELD"),
        }
        required = {key: self.config[key] for key in keys.get(source, ())}
        if source is FeatureSource.INTERACTION:
            # RecBole lets a data set of contexts do without ids
            required = {key: field for key, field in required.items() if field is not None}
            if self._orders_by_time:
                required["TIME_FIELD"] = self.config["TIME_FIELD"]
            if isinstance(self, SequentialDataset) and self._list_field is not None:
                required["LIST_SUFFIX"] = self._list_field
        return required

    @property
    def _orders_by_time(self) -> bool:
        ready_made = self.config["benchmark_filename"] is not None
        return not ready_made and self.config["eval_args"]["order"] == "TO"

    def _mend_of_column(self, key: str, source: str) -> str:
        mend = f"add it to load_col.{source}, or set {key}"
        if key == "LIST_SUFFIX":
            return f"{mend}: the parts of benchmark_filename hold the history of each row"
        if key == "TIME_FIELD" and not isinstance(self, SequentialDataset):
            return (
                f"{mend}; without times: eval_args: {{split: {{RS: [0.8, 0.1, 0.1]}}, order: RO}}"
            )
        return mend

    def _load_feat(self, filepath: str, source: FeatureSource | str) -> pd.DataFrame | None:
        """RecBole's contract: a frame, and the properties of its fields; read by our reader."""
        load_col, unload_col = self._get_load_and_unload_col(source)
        if load_col == set() and source is not FeatureSource.INTERACTION:
            return None
        header = read_header(filepath, self._format)
        columns = [
            field
            for field in header
            if (load_col is None or field in load_col)
            and (unload_col is None or field not in unload_col)
        ]
        name = getattr(source, "value", source)
        if source is FeatureSource.ITEM:
            for field in self.config["selected_features"] or ():
                if field not in header:
                    raise InputError(
                        f"{filepath}: no column {field!r} (selected_features); name some of "
                        f"{', '.join(header)}{nearest(str(field), header)}"
                    )
        for field in sorted(set(load_col or ()) - header.keys()):
            _LOG.warning(
                "%s: no column %r (load_col.%s)%s", filepath, field, name, nearest(field, header)
            )
        if not columns and source is not FeatureSource.INTERACTION:
            _LOG.warning("%s: load_col.%s names none of its columns", filepath, name)
            return None
        for key, field in self._required_columns(source).items():
            if field not in columns:
                raise InputError(
                    f"{filepath}: no column {field!r} ({key}) among those to be read: "
                    f"{', '.join(columns) or 'none'}; {self._mend_of_column(key, str(name))}"
                    f"{'' if field in header else nearest(str(field), header)}"
                )
            is_id = key in ("USER_ID_FIELD", "ITEM_ID_FIELD")
            if is_id and header[str(field)] is not FeatureType.TOKEN:
                raise InputError(
                    f"{filepath}, line 1: {field} ({key}) is of type {header[str(field)].value}; "
                    f"an id is text: write {field}:token"
                )
        time = self.time_field if source is FeatureSource.INTERACTION else None
        if time in columns and header[time] is not FeatureType.FLOAT:
            raise InputError(
                f"{filepath}, line 1: {time} (TIME_FIELD) is of type {header[time].value}; "
                f"a time is a number: write {time}:float"
            )
        table = read_atomic(
            filepath,
            self._format,
            columns=columns,
            time_field=time,
            on_bad_time=self.config["on_bad_time"] or "error",
        )
        self._bad_times += table.dropped
        for field, kind in table.types.items():
            if source != "link":  # its entities have their properties already
                if self.field2source.get(field, source) != source and field not in self._id_fields:
                    raise InputError(
                        f"{filepath}, line 1: a column {field!r} is loaded from "
                        f".{getattr(self.field2source[field], 'value', self.field2source[field])} "
                        "too, and RecBole knows columns by name; rename or unload one of them"
                    )
                self.field2source[field] = source
                self.field2type[field] = kind
                if "float" in kind.value:
                    self.field2bucketnum[field] = 2
                if not kind.value.endswith("seq"):
                    self.field2seqlen[field] = 1
            if kind.value.endswith("seq"):
                self._cut_sequences(table, field)
        return table.frame

    def _cut_sequences(self, table: AtomicTable, field: str) -> None:
        """Note the length of a sequence field, ``seq_len`` at most."""
        longest = max(map(len, table.frame[field]))
        limit = (self.config["seq_len"] or {}).get(field, longest)
        if longest > limit:
            table.frame[field] = [sequence[:limit] for sequence in table.frame[field]]
        self.field2seqlen[field] = min(longest, limit)

    # ------------------------------------------------------------------ filtering

    def _data_filtering(self) -> None:
        if self._id_fields:
            for field in self._id_fields:  # integers are faster than tokens; an empty id is 0
                self._codes[field] = pd.factorize(self.inter_feat[field])[0] + 1
            self._note_step("as read")
        super()._data_filtering()

    @property
    def _id_fields(self) -> list[str]:
        """User and item field; RecBole has either both or none."""
        return [field for field in (self.uid_field, self.iid_field) if field is not None]

    def _note_step(self, name: str) -> None:
        """Remember what a filter left, if it left something out.

        Filters keep the labels of the index, which are row numbers of the file.
        """
        rows = self.inter_feat.index.to_numpy()
        if not self._codes or (self._steps and self._steps[-1].interactions == len(rows)):
            return
        users, items = (
            int(np.count_nonzero(np.bincount(codes[rows])[1:])) for codes in self._codes.values()
        )
        self._steps.append(FilterStep(name, users, items, len(rows)))
        if not len(rows):
            counts = "; ".join(step.line() for step in self._steps)
            raise InputError(
                f"data set {self.dataset_name!r}: the filters leave no interaction: {counts}; "
                f"loosen {name}"
            )

    def _filter_nan_user_or_item(self) -> None:
        """Leave out rows without an id (RecBole drops other rows if both ids occur empty)."""
        for field, feat in self._side_files():
            feat.dropna(subset=[field], inplace=True)
        if self._id_fields:
            has_ids = np.logical_and.reduce([codes > 0 for codes in self._codes.values()])
            if not has_ids.all():
                self.inter_feat = self.inter_feat[has_ids]
            self._note_step("rows with an empty id")

    def _remove_duplication(self) -> None:
        """As RecBole, except that equal times keep the order of the file."""
        keep = self.config["rm_dup_inter"]
        if keep is None:
            return
        self._check_field("uid_field", "iid_field")
        if self.time_field in self.inter_feat:
            self.inter_feat = self.inter_feat.sort_values(self.time_field, kind="stable")
        else:
            _LOG.warning("rm_dup_inter: no time is read, so the order of the file decides")
        self.inter_feat = self.inter_feat.drop_duplicates(self._id_fields, keep=keep)
        self._note_step("rm_dup_inter")

    def _filter_by_field_value(self) -> None:
        """As RecBole; a user or item that a condition on its own file removes loses its rows."""
        for field in self.config["val_interval"] or ():
            if field not in self.field2type:
                hint = nearest(str(field), self.field2type)
                raise InputError(
                    f"val_interval: no column {field!r} is read{hint}; add it to load_col.inter "
                    "(or .user, .item), or mend its name"
                )
        before = {
            field: feat[field]
            for field, feat in self._side_files()
            if self.config["filter_inter_by_user_or_item"]
        }
        super()._filter_by_field_value()
        for field, feat in self._side_files():
            removed = set(before.get(field, ())).difference(feat[field])
            if removed:
                self.inter_feat = self.inter_feat[~self.inter_feat[field].isin(removed)]
        self._note_step("val_interval")

    def _side_files(self) -> list[tuple[str, pd.DataFrame]]:
        """The id field and the frame of ``.user`` and ``.item``, of those that are loaded."""
        files = ((self.uid_field, self.user_feat), (self.iid_field, self.item_feat))
        return [(field, feat) for field, feat in files if feat is not None]

    def _filter_inter_by_user_or_item(self) -> None:
        """Nothing: an interaction stays, whether ``.user`` and ``.item`` know its ends or not."""

    def _parse_intervals_str(self, intervals_str: Any) -> Any:
        """As RecBole, which goes on without a filter that it cannot read."""
        text = str(intervals_str)
        try:
            intervals = super()._parse_intervals_str(intervals_str)
        except (IndexError, ValueError):
            intervals = []
        legible = intervals is None or len(intervals) == text.count(";") + 1
        if not legible or any(left > right for _, left, right, _ in intervals or ()):
            raise InputError(
                f"{text!r} is no interval of val_interval or an *_num_interval; write for example "
                "'[5,inf)', or '[1,3];(7,9)' for two"
            )
        return intervals

    def _filter_by_inter_num(self) -> None:
        """RecBole's k-core, on counts of integer codes."""
        keys = {
            self.uid_field: "user_inter_num_interval",
            self.iid_field: "item_inter_num_interval",
        }
        intervals = {
            field: interval
            for field in self._id_fields
            if (interval := self._parse_intervals_str(self.config[keys[field]]))
        }
        rows = self.inter_feat.index.to_numpy()
        while True:
            legal = np.ones(len(rows), dtype=bool)
            for field, interval in intervals.items():
                codes = self._codes[field][rows]
                legal &= self._within_intervals(np.bincount(codes), interval)[codes]
            if legal.all():
                break
            rows = rows[legal]
        if len(rows) < len(self.inter_feat):
            self.inter_feat = self.inter_feat.loc[rows]
            self._note_step(", ".join(keys[field] for field in intervals))

    def _reset_index(self) -> None:
        self._codes = {}
        self._keep_known_ids()
        super()._reset_index()

    def _keep_known_ids(self) -> None:
        """Take users and items that ``.inter`` does not know out of all other files.

        Without this they would join the id space, and with it the candidate set. Entities of a
        knowledge graph are ids of their own and stay.
        """
        for name in ("user_id", "item_id"):
            for field in self.alias[name]:
                if field not in self.field2type:
                    raise InputError(
                        f"alias_of_{name}: no column {str(field)!r} is loaded; add it to "
                        f"load_col, or remove it{nearest(field, self.field2type)}"
                    )
            fields = self._get_remap_list(self.alias[name])
            others = [entry for entry in fields if entry[0] is not self.inter_feat]
            if not others:
                continue
            known: set[Any] = set()
            for feat, field, kind in fields:
                if feat is self.inter_feat:
                    known.update(_tokens(feat[field], kind))
            for feat, field, kind in others:
                if kind is FeatureType.TOKEN_SEQ:
                    feat[field] = [
                        np.array([token for token in row if token in known], dtype=object)
                        for row in feat[field]
                    ]
                    continue
                unknown = ~feat[field].isin(known)
                if unknown.all():
                    raise InputError(
                        f"data set {self.dataset_name!r}: no {field} of .inter occurs in the file "
                        f"with {', '.join(feat.columns[:4])}; .inter has {_examples(known)}, the "
                        f"file has {_examples(feat[field])}: write the same ids in both"
                    )
                feat.drop(feat.index[unknown], inplace=True)

    def _filter_link(self) -> None:
        """RecBole's, of a knowledge graph, without its removal of items that have no entity."""
        inter_feat = self.inter_feat
        self.inter_feat = inter_feat.copy()
        super()._filter_link()
        self.inter_feat = inter_feat

    # ------------------------------------------------------------------ ids and order

    def _remap_ID_all(self) -> None:  # noqa: N802  (RecBole's name)
        if self.benchmark_filename_list is not None:
            self._refuse_empty_ids()
            self._check_length()
            self._keep_known_ids()  # such data are not filtered
        if self.item_feat is not None:
            known = self.inter_feat[self.iid_field].nunique()
            self._items_without_row = known - self.item_feat[self.iid_field].nunique()
        super()._remap_ID_all()
        if self._orders_by_time:
            self._order_by_time()
        if self.config["cold_items"]:
            self._find_cold_items()
        self.report = self._count()
        if self.time_field in self.inter_feat:
            self.inter_feat[self.time_field] = self.inter_feat[self.time_field].astype(np.float64)

    def _check_length(self) -> None:
        """Positions are numbered up to the longest list that the configuration speaks of."""
        field, most = self._list_field, self.config["MAX_ITEM_LIST_LENGTH"]
        longest = self.field2seqlen.get(field, 0)
        if isinstance(self, SequentialDataset) and longest > most:
            raise InputError(
                f"MAX_ITEM_LIST_LENGTH is {most}, but {field} in the files has up to {longest} "
                f"items: set it to {longest}, or keep the last {most} of each list in the files"
            )

    def _refuse_empty_ids(self) -> None:
        """In files that come split no row can be left out, and an empty id would be padding."""
        parts = np.repeat(self.benchmark_filename_list, self.file_size_list)
        fields = [*self._id_fields, self._list_field]
        for field in (field for field in fields if field in self.inter_feat):
            column = self.inter_feat[field]
            is_list = self.field2type[field] is FeatureType.TOKEN_SEQ
            is_empty = (column.map(len) == 0 if is_list else column.isna()).to_numpy()
            if is_empty.any():
                first = int(is_empty.argmax())
                row = first - int((parts == parts[first]).argmax()) + 1
                raise InputError(
                    f"{self.dataset_name}.{parts[first]}.inter, interaction {row}: {field} is "
                    "empty; remove such rows, a data set that comes split is not filtered"
                )

    def _order_by_time(self) -> None:
        """Bring the interactions into the order of their exact times.

        All later sorts of RecBole are stable, and normalisation and rounding never swap two times,
        so that this order holds.
        """
        order = np.argsort(self.inter_feat[self.time_field].to_numpy(), kind="stable")
        self.inter_feat = self.inter_feat.iloc[order].reset_index(drop=True)

    def _find_cold_items(self) -> None:
        if not self._orders_by_time or (
            isinstance(self, SequentialDataset) and not self.gathers_histories
        ):
            raise InputError(
                f"cold_items is not possible for {self.config['model']} with this data: it needs "
                "eval_args order TO and a model whose data set keeps whole histories; set "
                "cold_items: 0"
            )
        columns = [self.inter_feat[f].to_numpy() for f in (*self._id_fields, self.time_field)]
        percent = self.config["cold_items"]
        self._is_cold = newest_items(columns[0], columns[1], columns[2], self.item_tokens, percent)

    def _count(self) -> DataReport:
        report = DataReport(
            dataset=self.dataset_name,
            users=self.user_num - 1 if self.uid_field else 0,
            items=self.item_num - 1 if self.iid_field else 0,
            interactions=len(self.inter_feat),
            steps=tuple(self._steps),
            histories=self._histories(),
            columns=self._other_columns(),
            bad_times=self._bad_times,
            items_without_row=self._items_without_row,
        )
        if self.time_field not in self.inter_feat or not self._id_fields:
            return report
        same_time = [self.uid_field, self.time_field]
        shared = self.inter_feat[self.inter_feat.duplicated(same_time, keep=False)]
        return replace(
            report,
            equal_times=int(shared.duplicated(same_time).sum()),
            duplicates=int(shared.duplicated([*same_time, self.iid_field]).sum()),
        )

    def _histories(self) -> str:
        if not self._id_fields:
            return ""
        users, items = (self.inter_feat[field].to_numpy(np.int64) for field in self._id_fields)
        order = np.argsort(users, kind="stable")
        return hashlib.sha256(np.stack([users[order], items[order]]).tobytes()).hexdigest()[:12]

    def _other_columns(self) -> str:
        ids = self._id_fields
        # of the time only its order matters, unless it is embedded
        plain = {self.time_field} - set(self.config["numerical_features"] or ())
        digest = hashlib.sha256()
        for key, feat in ((None, self.inter_feat), *self._side_files()):
            rows = feat if key is None else feat.sort_values(key, kind="stable")
            for field in sorted(set(rows.columns) - plain - set(ids if key is None else ())):
                column = rows[field]
                digest.update(f"{field}\n".encode())
                if column.dtype == object:  # sequences
                    digest.update(np.array([len(cell) for cell in column]).tobytes())
                    column = np.concatenate([np.zeros(0), *column])
                digest.update(np.asarray(column, np.float64).tobytes())
        return digest.hexdigest()[:12]

    def _dataframe_to_interaction(self, data: pd.DataFrame) -> Interaction:
        """As RecBole; sequential models, and a split by time, keep the time in float64."""
        interaction = super()._dataframe_to_interaction(data)
        time = self.time_field
        # an embedded time goes through float32 layers
        is_embedded = time in self.config["numerical_features"]
        is_exact = isinstance(self, SequentialDataset) or self._splits_by_time
        if is_exact and time in data and not is_embedded:
            interaction[time] = torch.from_numpy(data[time].to_numpy(np.float64, copy=True))
        return interaction

    # ------------------------------------------------------------------ splitting

    def build(self) -> list[Dataset]:
        """RecBole's parts of the split, counted in :attr:`report`.

        Raises:
            InputError: If no row is left to train on.
        """
        parts: list[Dataset] = super().build()
        if self._is_cold is not None:
            parts[0]._leave_out(torch.from_numpy(self._is_cold))
        self._prepare_parts(parts)
        counts = []
        for name, part in zip(_PARTS, parts, strict=False):
            users = len(torch.unique(part.inter_feat[self.uid_field])) if self.uid_field else 0
            counts.append(
                PartCount(name, users, len(part), part._n_targets(), self.report.users - users)
            )
        self.report = replace(self.report, parts=tuple(counts))
        for part in parts:
            part.report = self.report
        if not len(parts[0]):
            raise InputError(
                f"data set {self.dataset_name!r}: no row is left to train on; "
                + "; ".join(self.report.lines())
            )
        return parts

    def _leave_out(self, is_cold: Tensor) -> None:
        """Take the interactions with some items, ``(N,)`` bool, out of this part.

        With one interaction left a user goes, too: it is no target for a sequential model. They
        stay in :attr:`left_out`, users and items: the users have seen them nevertheless.
        """
        users = self.inter_feat[self.uid_field]
        keep = ~is_cold[self.inter_feat[self.iid_field]]
        keep &= torch.bincount(users[keep], minlength=self.user_num)[users] > 1
        gone = (~keep).nonzero().squeeze(1)
        self.left_out = (users[gone], self.inter_feat[self.iid_field][gone])
        self.inter_feat = take(self.inter_feat, keep.nonzero().squeeze(1))

    def _prepare_parts(self, parts: list[Dataset]) -> None:
        """What a subclass does to the parts of a split before they are counted."""

    def _n_targets(self) -> int:
        return len(self)

    def leave_one_out(self, group_by: str | None, leave_one_mode: str) -> list[Dataset]:
        """Hold out the last rows of every user.

        RecBole splits the rows of a sequential data set, of which a user has one fewer than
        interactions, but the interactions themselves for general models. Here both train on and
        hold out the same: with one interaction a user is in no part, with two only trained on, with
        three also tested, with more also validated.
        """
        held_out = {"valid_and_test": (1, 2), "valid_only": (1,), "test_only": (2,)}
        if leave_one_mode not in held_out or group_by is None:
            raise InputError(
                f"eval_args: split LS takes one of {', '.join(held_out)} and USER_ID_FIELD, got "
                f"{leave_one_mode!r} and {group_by!r}"
            )
        spare = 1 if isinstance(self, SequentialDataset) else 2  # rows that stay in training
        held = held_out[leave_one_mode]
        return self._parts(splitting.last_rows(self._column(group_by), held, spare))

    def split_by_ratio(self, ratios: list[float], group_by: str | None = None) -> list[Dataset]:
        """As RecBole, without its lists of row numbers."""
        shares = [ratio / sum(ratios) for ratio in ratios]

        def bounds(n_rows: int) -> list[int]:
            return list(self._calcu_split_ids(tot=n_rows, ratios=shares))

        if group_by is None:
            return self._parts(np.split(np.arange(len(self)), bounds(len(self))))
        return self._parts(splitting.shares(self._column(group_by), bounds, len(shares)))

    @property
    def _splits_by_time(self) -> bool:
        ready_made = self.config["benchmark_filename"] is not None
        return not ready_made and "TS" in (self.config["eval_args"]["split"] or {})

    def time_based_split(self, ratios: list[float], group_by: str | None) -> list[Dataset]:
        """Hold out what comes after a moment, and before it the last share of every user.

        RecBole's rule, on the exact times of all interactions. RecBole takes the moment from the
        rows of a sequential data set, of which a user has one fewer than interactions, and from
        times in float32 for general models. Here both train on and hold out the same; the first
        interaction of a user is never held out, and not trained on alone.
        """
        if not self._orders_by_time or group_by is None:
            raise InputError("eval_args: split TS needs order: TO and USER_ID_FIELD")
        if isinstance(self, SequentialDataset) and not self.gathers_histories:
            raise InputError(
                f"eval_args: split TS is not possible for {self.config['model']}, whose data set "
                "class keeps only the last items of a history; use LS"
            )
        times = self._all_times()
        if times.ndim > 1:
            raise InputError(
                f"eval_args: split TS needs {self.time_field} as it is, but numerical_features "
                "makes it an embedded feature; leave it out there"
            )
        parts = splitting.before_and_after(
            self._column(group_by),
            self._column(self.time_field),
            moment=np.percentile(times, 100 * (1 - ratios[-1] / sum(ratios))),
            train_share=ratios[0] / (ratios[0] + ratios[1]),
            n_before=1 if self.gathers_histories else 0,
        )
        return self._parts(parts)

    def _all_times(self) -> NDArray[np.float64]:
        return self._column(self.time_field)

    def _column(self, field: str) -> NDArray[Any]:
        column: NDArray[Any] = self.inter_feat[field].numpy()
        return column

    def _parts(self, rows: Iterable[splitting.Rows]) -> list[Dataset]:
        self._drop_unused_col()
        return [self.copy(take(self.inter_feat, torch.from_numpy(part))) for part in rows]

    # ------------------------------------------------------------------ side information

    @property
    def item_tokens(self) -> list[str]:
        """``(N,)`` token of each internal item id; the first is that of padding."""
        return [str(token) for token in self.field2id_token[self.iid_field]]

    @property
    def item_features(self) -> FeatureTable:
        """Vectors of the declared ``modalities``, by internal item id."""
        return self._once("features", self._load_features)

    @property
    def item_categories(self) -> CategoryTable | None:
        """Categories of the column ``category_field`` of ``.item``; ``None`` without that key.

        A ``token`` column gives every item one category; ``_`` stands for none.

        Raises:
            InputError: If ``.item`` has no such column, or it is not of tokens.
        """
        return self._once("categories", self._load_categories)

    @property
    def categories_read(self) -> CategoryTable | None:
        """The categories, if a model has asked for them."""
        found: CategoryTable | None = self._side_information.get("categories")
        return found

    def _once(self, name: str, make: Callable[[], _T]) -> _T:
        if name not in self._side_information:
            self._side_information[name] = make()
        found: _T = self._side_information[name]
        return found

    def _load_features(self) -> FeatureTable:
        tokens = self.item_tokens
        where: dict[str, Any] = {
            "dataset_name": self.dataset_name,
            "dataset_path": self.dataset_path,
            "atomic": self._format,
        }
        declarations: Mapping[str, Mapping[str, Any]] = resolve_declarations(
            self.config["modalities"] or {},
            tokens=tokens,
            cache_dir=self.config["feature_cache_dir"],
            progress=bool(self.config["show_progress"]),
            item_id_field=self.iid_field,
            knowledge_fields=[self.config[key] for key in _KNOWLEDGE_FIELDS],
            **where,
        )
        coverage = self.config["min_coverage"]
        table = load_features(
            declarations,
            tokens,
            min_coverage=0.9 if coverage is None else coverage,
            **where,
        )
        return table.hiding(self.config["hidden_features"] or {}, tokens)

    def get_preload_weight(self, field: str) -> NDArray[np.float32]:
        """RecBole's, in the number type of its models: KSR multiplies it by their vectors."""
        weight: NDArray[np.float32] = super().get_preload_weight(field).astype(np.float32)
        return weight

    def _load_categories(self) -> CategoryTable | None:
        field = self.config["category_field"]
        if field is None:
            return None
        rows = self._item_column(field)
        lists = [[row] if isinstance(row, str) else list(row) for row in rows]
        table = CategoryTable.from_lists(
            [[name for name in row if name not in _MISSING_TEXT] for row in lists]
        )
        if not table.names:
            raise InputError(
                f"{self._item_file}: no item of {self.dataset_name!r} has an entry in {field} "
                "(category_field); name another column"
            )
        return table

    @property
    def _item_file(self) -> Path:
        return Path(self.dataset_path) / f"{self.dataset_name}.item"

    def _item_column(self, field: str) -> list[Any]:
        """Cells of a column of ``.item`` by internal item id; ``()`` where there is none."""
        header = read_header(str(self._item_file), self._format)
        if field not in header:
            raise InputError(
                f"{self._item_file}: no column {field!r} (category_field); name one of "
                f"{', '.join(header)}{nearest(field, header)}, or leave the key out"
            )
        table = read_atomic(self._item_file, self._format, columns=[self.iid_field, field])
        if "float" in table.types[field].value:
            raise InputError(
                f"{self._item_file}: {field} is of type {table.types[field].value}; "
                "category_field needs a column of type token_seq"
            )
        frame = table.frame.drop_duplicates(self.iid_field)  # the first row counts, as in RecBole
        cells = dict(zip(frame[self.iid_field], frame[field], strict=True))
        found = [cells.get(token, ()) for token in self.item_tokens[1:]]
        return [(), *(() if isinstance(cell, float) else cell for cell in found)]


def _tokens(column: pd.Series, kind: FeatureType) -> Iterable[Any]:
    if kind is FeatureType.TOKEN_SEQ:
        return (token for row in column for token in row)
    return pd.unique(column)


def _examples(tokens: Iterable[Any]) -> str:
    return ", ".join(repr(token) for _, token in zip(range(3), tokens, strict=False))
