"""What a data set holds, and what was left out on the way to it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class FilterStep:
    """What is left after one step of filtering."""

    name: str
    users: int
    items: int
    interactions: int

    def line(self) -> str:
        """One line for the terminal."""
        return (
            f"{self.name}: {self.users} users, {self.items} items, {self.interactions} interactions"
        )


@dataclass(frozen=True)
class PartCount:
    """One part of the split.

    Attributes:
        name: ``train``, ``valid`` or ``test``.
        users: Users with at least one row.
        rows: Rows that a loader goes through.
        targets: Items to be predicted; more than rows if a training row is a window.
        without: Users of the data set without a row: with leave-one-out their history is too short
            for this part, with other splits they also have no time or share in it.
    """

    name: str
    users: int
    rows: int
    targets: int
    without: int

    def line(self) -> str:
        """One line for the terminal."""
        targets = f" with {self.targets} targets" if self.targets != self.rows else ""
        without = f"; {self.without} users have none" if self.without else ""
        return f"{self.name}: {self.rows} rows{targets} of {self.users} users{without}"


@dataclass(frozen=True)
class DataReport:
    """Counts of a data set.

    Attributes:
        dataset: Name.
        users: Users with an interaction, padding not counted.
        items: The same for items; this is the candidate set.
        interactions: After all filters.
        steps: What was read, then each filter that left something out.
        histories: Fingerprint of every user's items in their order, by internal ids.
        columns: Fingerprint of what else is loaded: other columns of ``.inter``, ``.user`` and
            ``.item``, tokens by internal ids.
        bad_times: Rows without a usable time that ``on_bad_time: drop`` left out.
        duplicates: Rows that repeat user, item and time of an earlier one; they are kept, unless
            ``rm_dup_inter`` says otherwise.
        equal_times: Rows with the time of an earlier one of the same user; they stay in the order
            of the file.
        items_without_row: Items without a row in ``.item``, ``None`` if it is not loaded.
        parts: The split; empty before ``build``.
    """

    dataset: str
    users: int
    items: int
    interactions: int
    steps: tuple[FilterStep, ...] = ()
    histories: str = ""
    columns: str = ""
    bad_times: int = 0
    duplicates: int = 0
    equal_times: int = 0
    items_without_row: int | None = None
    parts: tuple[PartCount, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            key: [dict(entry) for entry in value] if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }

    def lines(self) -> list[str]:
        """Lines for the terminal; what did not happen is not mentioned."""
        lines = [
            f"{self.dataset}: {self.users} users, {self.items} items, "
            f"{self.interactions} interactions"
        ]
        if len(self.steps) > 1:
            lines += [f"  {step.line()}" for step in self.steps]
        if self.bad_times:
            lines.append(f"  {self.bad_times} rows without a usable time dropped")
        if self.duplicates:
            lines.append(f"  {self.duplicates} repeated (user, item, time) rows kept")
        if self.equal_times:
            lines.append(
                f"  {self.equal_times} rows with the time of an earlier one of their user: "
                "in the order of the file"
            )
        if self.items_without_row:
            lines.append(f"  {self.items_without_row} items without a row in .item")
        return lines + [f"  {part.line()}" for part in self.parts]
