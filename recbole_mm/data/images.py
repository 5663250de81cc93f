"""Item images turned into a feature file, for ``recbole-mm extract``.

The name of an image without its suffix is the token of its item, and what makes numbers of it
stands in :mod:`recbole_mm.data.image_encoders`. Images are the work of strangers:
one that cannot be read leaves its item without a row and is listed with its reason. Only the
decoders of ``FORMATS`` are ever tried (Pillow's EPS starts Ghostscript), size and shape are judged
before anything is decoded, and a link that leads out of the folder is not followed.

Shapes: n images, F width of the encoder, K width of the result.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import shutil
import stat
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from recbole_mm import checkpoint
from recbole_mm.data.atomic import RECBOLES_FORMAT, AtomicFormat, read_atomic
from recbole_mm.data.decomposition import decompose
from recbole_mm.data.feature_files import save_features
from recbole_mm.data.image_encoders import Encoder, encoder_of, reason_of
from recbole_mm.errors import EnvironmentFault, InputError, printable
from recbole_mm.files import alone, write_text

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")

_IMAGES_VERSION = 1  # raise it when a change here changes numbers: kept parts are then encoded anew
_MIN_COVERAGE = 0.9  # the default of the key
_PART = 256  # images that an interruption may cost
_BATCH = 64
_PIXELS_WIDTH = 128
_MEND = "free space, or name another place with --out"

_MOST_BYTES = 1 << 28
_MOST_PIXELS = 1 << 26  # 8192 x 8192; 256 MiB decoded
# An encoder scales the shorter side to some 224 pixels: a line of 67 million would become 3 TB.
_MOST_STRETCHED = 100


@dataclass(frozen=True)
class Extraction:
    """What became of a folder of images.

    Attributes:
        path: The feature file.
        items: Items of the data set.
        encoded: Items with a row.
        width: Numbers in a row, K.
        encoder: As the metadata of the file name it.
        failed: Reason by file name, for images that could not be read.
        listing: The same as a text file, if there are any.
        without_image: Items without a file.
        unknown: Images of no item.
        kept: Images that an interrupted run had read.
    """

    path: Path
    items: int
    encoded: int
    width: int
    encoder: str
    failed: dict[str, str]
    listing: Path | None
    without_image: int
    unknown: int
    kept: int

    def lines(self) -> list[str]:
        """The report, printable."""
        kept = f" ({self.kept} images read by an earlier run)" if self.kept else ""
        lines = [
            f"{self.path.stem}: {self.encoded} of {self.items} items have a vector, "
            f"{self.width} wide, by {self.encoder}{kept}",
            f"{len(self.failed)} images failed, {self.without_image} items without an image, "
            f"{self.unknown} images of no item",
        ]
        if self.failed:
            lines += [f"failed: {_first_failures(self.failed)}; all in {self.listing}"]
        return lines

    def declaration(self, folder: Path) -> str:
        """YAML for a configuration whose data set stands in ``folder``."""
        path, folder = self.path.resolve(), folder.resolve()
        if path.is_relative_to(folder):
            path = path.relative_to(folder)
        share = int(100 * self.encoded / self.items) / 100
        low = f", min_coverage: {share}" if share < _MIN_COVERAGE else ""
        name = re.sub(r"\W+", "_", self.path.stem)
        quoted = json.dumps(str(path), ensure_ascii=False)  # YAML too, whatever stands in it
        return f"modalities:\n  {name}: {{path: {quoted}{low}}}"


@dataclass(frozen=True)
class _Part:
    """Some images, read and encoded.

    Attributes:
        rows: ``(k, F)``; ``None`` if none of them could be read.
        digests: sha256 by file name, in the order of the rows.
        failed: Reason by file name.
    """

    rows: Tensor | None
    digests: dict[str, str]
    failed: dict[str, str]


def item_tokens(
    folder: Path,
    name: str,
    *,
    item_id_field: str = "item_id",
    atomic: AtomicFormat = RECBOLES_FORMAT,
    benchmark: Sequence[str] = (),
) -> list[str]:
    """Items of a data set: those of ``.inter``, and of ``.item`` if there is one.

    Args:
        folder: Of the atomic files.
        name: Of the data set, their stem.
        item_id_field: Column of the items.
        atomic: How they are written.
        benchmark: Parts of a data set that comes split, for ``{name}.{part}.inter``.

    Raises:
        InputError: If a file cannot be read, or names no item.
    """
    files = [folder / f"{name}.{part}.inter" for part in benchmark] or [folder / f"{name}.inter"]
    if (folder / f"{name}.item").is_file():
        files = [folder / f"{name}.item", *files]
    tokens: dict[str, None] = {}
    for file in files:
        table = read_atomic(file, atomic, columns=[item_id_field], as_text=[item_id_field])
        tokens |= dict.fromkeys(table.frame[item_id_field])
    tokens.pop("", None)
    if not tokens:
        raise InputError(f"{files[0]}: names no item")
    return list(tokens)


def extract_images(
    folder: Path | str,
    out: Path | str,
    tokens: Sequence[str],
    *,
    encoder: str = "pixels",
    dim: int | None = None,
    max_failed: float = 0.1,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Extraction:
    """Encode the images of the items into the canonical feature file.

    What has been encoded is kept beside ``out`` in parts, from which a run goes on that was
    interrupted; they are removed with its end. An image that changed meanwhile is read anew.

    Args:
        folder: Holds ``<item token>.jpg`` (or .jpeg, .png, .webp, .gif, .bmp), not in subfolders.
        out: Feature file; ends in ``.safetensors``. Written whole or not at all.
        tokens: The items.
        encoder: ``pixels``, ``clip:NAME[/WEIGHTS]`` or ``timm:NAME``.
        dim: Width K; default 128 for ``pixels``, else that of the encoder. Reached by PCA for
            ``pixels`` (12 KB of memory for each item), else by truncated SVD.
        max_failed: Largest share of the images of items that may fail, in [0, 1].
        device: Where a network computes.
        progress: Show a progress bar.

    Raises:
        InputError: On a bad argument, a folder without an image of an item, two images of one
            item, more failures than ``max_failed``, naming the first three, or an ``out`` that
            another process is writing.
        EnvironmentFault: If a package or its weights are missing, or the disk says no.
    """
    folder, out = Path(folder), Path(out)
    if out.suffix != ".safetensors":
        raise InputError(f"out: {str(out)!r} must end in .safetensors")
    if not out.parent.is_dir():
        raise InputError(f"out: the folder {out.parent} does not exist; make it first")
    if dim is not None and dim < 1:
        raise InputError(f"dim: {dim}; set a positive whole number")
    if not 0 <= max_failed <= 1:
        raise InputError(f"max_failed: {max_failed}; set a share between 0 and 1")
    files, unknown = _images_of(folder, tokens)
    chosen = encoder_of(encoder, torch.device(device))

    parts = out.with_name(f".{out.name}.parts")
    busy = InputError(f"{out}: another process is writing it; wait for it, or name another --out")
    with alone(parts / ".lock", _MEND, busy):
        try:
            done, kept = _parts(list(files.values()), folder, chosen, parts, max_failed, progress)
            failed = {name: reason for part in done for name, reason in part.failed.items()}
            rows = [part.rows for part in done if part.rows is not None]
            if not rows:
                raise InputError(f"{folder}: no image can be read: {_first_failures(failed)}")
            numbers = torch.cat(rows).numpy()
            numbers, explained = _reduced(numbers, encoder, dim, folder)
            digests = {name: digest for part in done for name, digest in part.digests.items()}
            encoded = [token for token, path in files.items() if path.name in digests]
            listing = _list_failures(out, failed)
            listed = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
            save_features(
                out,
                torch.from_numpy(numbers),
                encoded,
                torch.from_numpy(numbers.any(axis=1)),
                {
                    **chosen.metadata,
                    "normalised": "l2",
                    "source": folder.resolve().name,
                    "source_sha256": hashlib.sha256(_encodable(listed)).hexdigest(),
                    "explained_variance": f"{explained:.4f}",
                    "failed": str(len(failed)),
                },
            )
        except InputError:
            shutil.rmtree(parts, ignore_errors=True)  # the same images would fail again
            raise
        shutil.rmtree(parts, ignore_errors=True)
    return Extraction(
        path=out,
        items=len(tokens),
        encoded=len(encoded),
        width=numbers.shape[1],
        encoder=chosen.metadata["encoder"],
        failed=failed,
        listing=listing,
        without_image=len(tokens) - len(files),
        unknown=unknown,
        kept=kept,
    )


def _images_of(folder: Path, tokens: Sequence[str]) -> tuple[dict[str, Path], int]:
    """The image of each item that has one, in the order of the items; images of no item."""
    if not folder.is_dir():
        raise InputError(f"images: {folder} is no folder; give the one that holds the images")
    try:
        images = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    except OSError as error:
        raise EnvironmentFault(
            f"images: {folder} cannot be read ({error.strerror}); check its permissions"
        ) from error
    if not images:
        raise InputError(
            f"images: {folder} holds no image ({', '.join(SUFFIXES)}); put <item token>.jpg into "
            "it, not into folders below it"
        )
    known, found, unknown = set(tokens), dict[str, Path](), 0
    for path in images:
        if path.stem not in known:
            unknown += 1
        elif path.stem in found:
            raise InputError(
                f"images: item {path.stem!r} has two, {found[path.stem].name} and {path.name}; "
                "keep one"
            )
        else:
            found[path.stem] = path
    if not found:
        raise InputError(
            f"images: none of the {len(images)} images is that of an item. Names there: "
            f"{', '.join(repr(p.stem) for p in images[:3])}; items here: "
            f"{', '.join(map(repr, tokens[:3]))}. Name each image after its item"
        )
    return {token: found[token] for token in tokens if token in found}, unknown


def _parts(
    files: Sequence[Path],
    folder: Path,
    encoder: Encoder,
    kept_in: Path,
    max_failed: float,
    progress: bool,
) -> tuple[list[_Part], int]:
    """All images, read and encoded, and how many of them an earlier run had read.

    It stops as soon as more have failed than may, of all.
    """
    done: list[_Part] = []
    n_failed = n_kept = 0
    with (
        _kept(kept_in),
        tqdm(total=len(files), desc="images", unit="", disable=not progress) as bar,
    ):
        for start in range(0, len(files), _PART):
            some = files[start : start + _PART]
            place = kept_in / f"{_part_key(some, encoder)}.safetensors"
            part = _read_part(place)
            if part is not None:
                n_kept += len(some)
            else:
                part = _encoded(some, folder.resolve(), encoder)
                tensors = {} if part.rows is None else {"rows": part.rows}
                about = {"digests": part.digests, "failed": part.failed}
                checkpoint.write(place, tensors, about)
            done.append(part)
            bar.update(len(some))
            n_failed += len(part.failed)
            if n_failed > max_failed * len(files):
                failed = {name: why for part in done for name, why in part.failed.items()}
                raise InputError(
                    f"images: {n_failed} of {len(files)} cannot be read, more than max_failed "
                    f"{max_failed:g} allows: {_first_failures(failed)}; mend or remove them, or "
                    "raise --max_failed"
                )
    return done, n_kept


@contextlib.contextmanager
def _kept(path: Path) -> Iterator[None]:
    """Say what the disk says against writing ``path`` in terms of this command."""
    try:
        yield
    except (EnvironmentFault, OSError) as error:
        reason = error if isinstance(error, OSError) else error.__cause__
        raise EnvironmentFault(f"{path}: cannot be written ({reason}); {_MEND}") from error


def _part_key(files: Sequence[Path], encoder: Encoder) -> str:
    """sha256 of what the rows of a part depend on; a file counts by name, size and time."""
    listing: list[Any] = [_IMAGES_VERSION, encoder.metadata]
    for path in files:
        try:
            about = path.stat()
            listing.append([path.name, about.st_size, about.st_mtime_ns])
        except OSError:
            listing.append([path.name])
    return hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()


def _read_part(place: Path) -> _Part | None:
    if not place.exists():
        return None
    try:
        held = checkpoint.read(place)
    except InputError:  # damaged; it is encoded anew
        return None
    return _Part(held.tensors.get("rows"), held.about["digests"], held.about["failed"])


def _encoded(files: Sequence[Path], root: Path, encoder: Encoder) -> _Part:
    rows: list[Tensor] = []
    batch: list[Tensor] = []
    digests: dict[str, str] = {}
    failed: dict[str, str] = {}
    for path in files:
        try:
            content = _content(path, root)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's, on files of which it reads a part
                batch.append(encoder.prepare(_rgb(content, encoder.draft)))
        except Exception as error:  # whatever a decoder makes of a stranger's bytes
            failed[path.name] = reason_of(error)
            continue
        digests[path.name] = hashlib.sha256(content).hexdigest()
        if len(batch) == _BATCH:
            rows.append(encoder.encode(torch.stack(batch)))
            batch = []
    if batch:
        rows.append(encoder.encode(torch.stack(batch)))
    return _Part(torch.cat(rows) if rows else None, digests, failed)


def _content(path: Path, root: Path) -> bytes:
    """The bytes of an image.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no plain file in ``root``, empty or too large.
    """
    if path.is_symlink() and not path.resolve(strict=True).is_relative_to(root):
        raise ValueError("a link out of the folder")
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):  # opening a pipe would wait for ever
        raise ValueError("not a file")
    if not about.st_size:
        raise ValueError("an empty file")
    if about.st_size > _MOST_BYTES:
        raise ValueError(f"{about.st_size} bytes, {_MOST_BYTES} are the most")
    return path.read_bytes()


def _rgb(content: bytes, draft: int | None = None) -> Image.Image:
    """The first picture of a file, upright, as RGB; what is transparent becomes white.

    Raises:
        ValueError: If it is too large or too stretched to be a picture of an item.
        Exception: Whatever Pillow raises on a damaged file.
    """
    from PIL import Image, ImageOps

    image: Image.Image
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        width, height = image.size
        if width * height > _MOST_PIXELS:
            raise ValueError(f"{width} x {height} pixels, {_MOST_PIXELS} are the most")
        if max(width, height) > _MOST_STRETCHED * min(width, height):
            raise ValueError(f"{width} x {height} pixels, a line and no picture")
        if draft is not None:
            image.draft(None, (draft, draft))
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits, which `convert` would clip and not scale
            grey = np.asarray(image).astype(np.int64) // 257
            image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def _encodable(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")  # a file name may be any bytes


def _first_failures(failed: dict[str, str]) -> str:
    first = [f"{printable(name)} ({reason})" for name, reason in list(failed.items())[:3]]
    more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
    return ", ".join(first) + more


def _list_failures(out: Path, failed: dict[str, str]) -> Path | None:
    """Write one line for each image that failed; without any, remove the list of before."""
    listing = out.with_suffix(".failed.txt")
    if not failed:
        listing.unlink(missing_ok=True)
        return None
    lines = [f"{printable(name)}\t{reason}\n" for name, reason in failed.items()]
    with _kept(listing):
        write_text(listing, "".join(lines))
    return listing


def _reduced(
    rows: npt.NDArray[Any], encoder: str, dim: int | None, folder: Path
) -> tuple[npt.NDArray[np.float32], float]:
    """Rows of length 1 ``(n, K)``, and the share of the variance that they hold."""
    if encoder != "pixels" and dim is None:
        return rows, 1.0
    if encoder == "pixels":
        rows = rows.astype(np.float64)
        rows -= rows.mean(axis=0)
        spread = rows.std(axis=0)
        rows = np.divide(rows, spread, out=rows, where=spread > 0)
        if not rows.any():
            raise InputError(
                f"images: all that can be read in {folder} look the same, which tells nothing"
            )
    return decompose(rows, dim or _PIXELS_WIDTH, "image")
