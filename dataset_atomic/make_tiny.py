"""Generate ``tiny``: a small multimodal data set whose answer is planted.

Forty designs stand on a circle; after an item of design ``d`` a user takes, nine times in
ten, an item of design ``d + 1``. Three items share one design: the same title, categories
and text vector, nearly the same picture. They differ in nothing but their id. One of the
three is common in the histories, its two twins are rare there; the last two items of a user
(validation and test under leave-one-out) are any of the three with equal chance. A model of
ids alone has hardly seen the rare twins; a model of features knows them from the common one.

    python dataset_atomic/make_tiny.py            # rewrites dataset_atomic/tiny
    python dataset_atomic/make_tiny.py FOLDER     # writes the same files to FOLDER

The files are the same bytes on every platform and numpy: only ``Generator.random`` is drawn
from (PCG64, whose stream numpy keeps; NEP 19 allows the other distributions to change), and
nothing but sums, products and comparisons is applied to the draws.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

SEED = 20240229

N_DESIGNS = 40
N_TWINS = 3  # items of one design; number 0 is the common one
N_ITEMS = N_DESIGNS * N_TWINS
N_USERS = 300
SHORTEST, LONGEST = 6, 16  # items of a user, both included
FOLLOW = 0.9  # chance that the next design is the next on the circle
COMMON = 0.94  # chance of the common twin before the last two items of a user
WIDTH = 16  # of both feature matrices
IMAGE_NOISE = 0.05  # half-width of what sets the pictures of twins apart
N_WITHOUT_IMAGE = 6

# In float32 seconds near 1.6e9 lie 128 s apart: nearly every step of 1 to 40 s is lost there.
FIRST_SECOND, LONGEST_STEP = 1_600_000_000, 40

COLOURS = ("Amber", "Blue", "Coral", "Denim", "Ebony", "Fawn", "Grey", "Hazel")
THINGS = ("notebook", "lantern", "teapot", "scarf", "compass")
KINDS = {
    "notebook": "Office",
    "lantern": "Home_&_Garden",
    "teapot": "Home_&_Garden Kitchen",
    "scarf": "Clothing",
    "compass": "Outdoor",
}
STYLES = ("Classic", "Modern")

# What real titles contain and readers stumble over, each on one rare twin (design -> title).
ODD_TITLES = {
    3: '"{}',  # a quote that is never closed swallows rows in a quoting reader
    8: '{} 5"',
    13: 'The "{}", boxed',
    18: "NA",  # text, not a missing value
    23: "nan",
    28: "_",  # missing, in the way of the atomic files
    33: "",  # missing
    38: "{} café 🫖",
}
DESIGNS_WITHOUT_CATEGORY = (7, 31)


def integers(rng: np.random.Generator, n: int, size: int) -> np.ndarray:
    """Draw ``size`` integers from ``0 .. n - 1``."""
    return (rng.random(size) * n).astype(np.int64)


def vectors(rng: np.random.Generator, n: int) -> np.ndarray:
    """Draw ``n`` feature vectors, uniform in [-1, 1]: ``(n, WIDTH)``."""
    return 2 * rng.random((n, WIDTH)) - 1


def title(design: int, twin: int) -> str:
    """Name an item; all twins have one name, odd titles aside."""
    plain = f"{COLOURS[design % len(COLOURS)]} {THINGS[design % len(THINGS)]}"
    if twin == N_TWINS - 1 and design in ODD_TITLES:
        return ODD_TITLES[design].format(plain)
    return plain


def categories(design: int) -> str:
    """List the categories of a design, separated by spaces; ``_`` where there is none."""
    if design in DESIGNS_WITHOUT_CATEGORY:
        return "_"
    style = STYLES[2 * (design % len(COLOURS)) // len(COLOURS)]
    return f"{KINDS[THINGS[design % len(THINGS)]]} {style}"


def histories(rng: np.random.Generator, items: np.ndarray) -> list[tuple[str, str, int]]:
    """Walk every user round the circle: rows (user, item, second), in no order.

    Args:
        rng: Source of chance.
        items: ``(N_DESIGNS, N_TWINS)`` number of each item.
    """
    rows = []
    for user in range(N_USERS):
        length = SHORTEST + int(integers(rng, LONGEST - SHORTEST + 1, 1)[0])
        follows = rng.random(length) < FOLLOW
        jumps = integers(rng, N_DESIGNS, length)
        common = rng.random(length) < COMMON
        rare = 1 + integers(rng, N_TWINS - 1, length)
        any_twin = integers(rng, N_TWINS, length)
        steps = 1 + integers(rng, LONGEST_STEP, length)
        seconds = FIRST_SECOND + integers(rng, 10**7, 1)[0] + steps.cumsum()

        design = jumps[0]
        for t in range(length):
            if t > 0:
                design = (design + 1) % N_DESIGNS if follows[t] else jumps[t]
            held_out = t >= length - 2
            twin = any_twin[t] if held_out else 0 if common[t] else rare[t]
            rows.append((f"u{user:03d}", f"i{items[design, twin]:03d}", int(seconds[t])))
    # no order in the file: a reader that loses the seconds cannot fall back on it
    return [rows[k] for k in rng.random(len(rows)).argsort(kind="stable")]


def write_table(path: Path, header: str, rows: Sequence[tuple[object, ...]]) -> None:
    """Write an atomic file: UTF-8, LF, a header of ``name:type``, tabs."""
    lines = [header, *("\t".join(map(str, row)) for row in rows)]
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())


def main(folder: Path) -> None:
    """Write the five files of the data set to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(SEED)

    # items are numbered at random, so that no order of ids, rows or first uses is the circle
    number = rng.random(N_ITEMS).argsort(kind="stable")
    items = number.reshape(N_DESIGNS, N_TWINS)
    listing = number.argsort(kind="stable")  # place in `items` of item 0, 1, ...
    design, twin = listing // N_TWINS, listing % N_TWINS

    rows = histories(rng, items)
    if len({item for _, item, _ in rows}) != N_ITEMS:
        raise RuntimeError("an item is in no history: choose another SEED")
    write_table(folder / "tiny.inter", "user_id:token\titem_id:token\ttimestamp:float", rows)
    write_table(
        folder / "tiny.item",
        "item_id:token\ttitle:token_seq\tcategories:token_seq",
        [(f"i{i:03d}", title(design[i], twin[i]), categories(design[i])) for i in range(N_ITEMS)],
    )

    text = vectors(rng, N_DESIGNS)[design]  # (N_ITEMS, WIDTH), rows as in tiny.item
    without = [title(d, t) in ("", "_") for d, t in zip(design, twin, strict=True)]
    text[without] = 0
    np.save(folder / "text.npy", text.astype(np.float16))

    image = vectors(rng, N_DESIGNS)[design] + IMAGE_NOISE * vectors(rng, N_ITEMS)
    kept = rng.random(N_ITEMS).argsort(kind="stable")[N_WITHOUT_IMAGE:]  # in no order either
    np.save(folder / "image.npy", image[kept].astype(np.float16))
    (folder / "image_ids.txt").write_bytes("".join(f"i{i:03d}\n" for i in kept).encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "tiny")
