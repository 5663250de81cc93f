"""What a search leaves: the best configuration, a table and a page of all trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from recbole_mm.config import NO_NUMBERS, Config
from recbole_mm.errors import InputError, NumericalError, OutOfMemory
from recbole_mm.plain_yaml import typed_value
from recbole_mm.tuning.search import Record, Search, write_text
from recbole_mm.tuning.space import Parameter


def write_outputs(search: Search, config: Config, records: Sequence[Record]) -> dict[str, Any]:
    """Write table, page and best configuration; what :func:`recbole_mm.tuning.tune` returns.

    Raises:
        NumericalError: If every trial failed; table and page are written all the same.
        OutOfMemory: Likewise, if all of them failed for lack of memory.
        InputError: Likewise, if no configuration may have the values of any of them.
    """
    best = search.best(records)
    write_text(search.folder / "trials.csv", _table(search, records).to_csv(index=False))
    write_text(search.folder / "trials.html", _page(search, records))
    if best is None:
        said = f"all {len(records)} trials failed, the first with: {records[0]['error']}"
        if all(record.get("out_of_memory") for record in records):
            raise OutOfMemory(said)
        if all(record.get("impossible") for record in records):
            raise InputError(f"{said}; mend the search space")
        raise NumericalError(f"{said}; narrow the search space, learning_rate first")
    record = records[best]
    path = search.out / search.settings["dataset"] / f"{search.settings['model']}.yaml"
    write_text(path, _best_yaml(search, config, records, best))
    return {
        "best": record["values"],
        "best_valid_score": record["score"],
        "best_valid_result": record["valid"],
        "valid_metric": search.metric,
        "trials": len(records),
        "failed": sum(r["error"] is not None for r in records),
        "config": str(path),
        "folder": str(search.folder),
        "data_path": _given_place(config),
    }


def _given_place(config: Config) -> str | None:
    """The ``data_path`` that the user has set; the best configuration does not repeat it."""
    if "data_path" not in config.external_config_dict:
        return None
    return str(Path(config["data_path"]).parent)


def _best_yaml(search: Search, config: Config, records: Sequence[Record], best: int) -> str:
    """The configuration of the best trial, and what every trial was given."""
    settings, record = search.settings, records[best]
    given = {k: v for k, v in _given(config).items() if k not in search.space}
    seeds = f" {search.seed}"
    if search.n_seeds > 1:
        seeds = f"s {search.seed} to {search.seed + search.n_seeds - 1}"
    head = (
        f"# {settings['model']} on {settings['dataset']}: the best of {len(records)} trials by "
        f"validation {search.metric}, {record['score']:.6f} (trial {best + 1}).\n"
        f"# Engine {settings['engine']}, {settings['algo']}, seed{seeds}; "
        "the test set was not scored. Written by recbole-mm tune.\n"
    )
    names = {"model": settings["model"], "dataset": settings["dataset"]}
    text = head + _yaml(names) + "\n# found\n" + _yaml(record["values"])
    return text + ("\n# given to every trial\n" + _yaml(given) if given else "")


def _given(config: Config) -> dict[str, Any]:
    """What files, ``config_dict`` and command line said, but for machine, terminal and seed."""
    values: dict[str, Any] = {}
    final, known = config.resolved(), config.internal_config_dict
    for key, value in config.external_config_dict.items():
        if key in NO_NUMBERS or key in ("model", "dataset", "seed") or key not in final:
            continue
        typed = typed_value(value, known.get(key)) if isinstance(value, str) else value
        # a list of modalities picks from what is declared elsewhere
        values[key] = final[key] if key == "modalities" else typed
    return values


def _yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)


def _table(search: Search, records: Sequence[Record]) -> pd.DataFrame:
    rows = [
        {
            "trial": number,
            "state": "complete" if record["error"] is None else "failed",
            "score": record["score"],
            **record["values"],
            **_by_seed(search, record["scores"] or ()),
            **{f"valid {name}": value for name, value in (record["valid"] or {}).items()},
            **{_last(key, search): record[key] for key in _LAST},
        }
        for number, record in enumerate(records, 1)
    ]
    table = pd.DataFrame(rows)
    last = [_last(key, search) for key in _LAST]
    return table[[c for c in table if c not in last] + last]


def _by_seed(search: Search, scores: Sequence[float]) -> dict[str, float]:
    """Columns for the scores of single seeds, if there are several."""
    if search.n_seeds == 1:
        return {}
    return {f"score of seed {seed}": score for seed, score in enumerate(scores, search.seed)}


_LAST = ("best_epoch", "epochs", "seconds", "error")


def _last(key: str, search: Search) -> str:
    """Name of a column of what a trial came to, beside one of the same name that is searched."""
    return f"{key} run" if key in search.space else key


def _page(search: Search, records: Sequence[Record]) -> str:
    """Score by trial with the best so far, and score by each parameter, as one HTML page."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    names = list(search.space)
    figure = make_subplots(
        rows=1 + -(-len(names) // 3),
        cols=3,
        specs=[[{"colspan": 3}, None, None]] + [[{}, {}, {}]] * -(-len(names) // 3),
        subplot_titles=["", *names],
        vertical_spacing=0.3 / (1 + -(-len(names) // 3)),
    )
    table = _table(search, records)
    done = table[table["state"] == "complete"]
    so_far = done["score"].cummax() if search.bigger else done["score"].cummin()
    values = {name: [str(record["values"][name]) for record in records] for name in names}
    hover = [
        "<br>".join(f"{name} {values[name][i]}" for name in names) for i in range(len(records))
    ]
    texts = [hover[i] for i in done.index]
    dots = {"mode": "markers", "showlegend": False, "text": texts, "hoverinfo": "text+y"}
    figure.add_scatter(
        x=done["trial"], y=so_far, line_shape="hv", mode="lines", name="best so far", row=1, col=1
    )
    figure.add_scatter(
        x=done["trial"],
        y=done["score"],
        **{**dots, "showlegend": True, "name": "trial"},
        row=1,
        col=1,
    )
    failed = table[table["state"] == "failed"]
    if len(failed) and len(done):
        figure.add_scatter(
            x=failed["trial"],
            y=[done["score"].min()] * len(failed),
            text=[f"failed: {record['error']}" for record in records if record["error"]],
            hoverinfo="text",
            mode="markers",
            marker_symbol="x",
            name="failed",
            row=1,
            col=1,
        )
    for index, parameter in enumerate(search.space.values()):
        place = {"row": 2 + index // 3, "col": 1 + index % 3}
        is_choice = parameter.kind == "choice"
        x = [values[parameter.name][i] for i in done.index] if is_choice else done[parameter.name]
        figure.add_scatter(x=x, y=done["score"], **dots, **place)
        figure.update_xaxes(**_axis(parameter), **place)
    figure.update_xaxes(title_text="trial", row=1, col=1)
    figure.update_yaxes(title_text=f"validation {search.metric}", row=1, col=1)
    figure.update_layout(
        title=f"{search.settings['model']} on {search.settings['dataset']}: "
        f"{len(records)} trials, {search.settings['engine']}, {search.settings['algo']}",
        template="plotly_white",
        height=400 + 260 * -(-len(names) // 3),
    )
    page: str = go.Figure(figure).to_html(include_plotlyjs=True, full_html=True)
    return page


def _axis(parameter: Parameter) -> dict[str, Any]:
    if parameter.kind == "choice":
        labels = [str(value) for value in parameter.values]
        return {"type": "category", "categoryorder": "array", "categoryarray": labels}
    return {"type": "log"} if parameter.kind == "loguniform" else {}
