"""What makes rows of images.

======================  ===========================================================
``pixels``              16 x 16 RGB, standardised, PCA (:func:`_pixels`)
``clip:NAME[/WEIGHTS]`` image tower of a CLIP model, by open_clip (:func:`_clip`)
``timm:NAME``           a vision model without its head, by timm (:func:`_timm`)
======================  ===========================================================

Shapes: b images of a batch, F width of the encoder.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_mm.errors import EnvironmentFault, InputError, nearest, printable

if TYPE_CHECKING:
    from PIL import Image

_SIDE = 16  # of the thumbnail of `pixels`


@dataclass(frozen=True)
class Encoder:
    """What makes rows of images.

    Attributes:
        prepare: RGB image -> tensor, the same shape for every image.
        encode: Tensors of a batch, stacked -> ``(b, F)`` on the CPU.
        metadata: ``encoder``, ``revision`` and ``pooling`` of the feature file.
        draft: Side that a JPEG may be scaled down to while it is decoded.
    """

    prepare: Callable[[Image.Image], Tensor]
    encode: Callable[[Tensor], Tensor]
    metadata: dict[str, str]
    draft: int | None = None


def encoder_of(text: str, device: torch.device) -> Encoder:
    """The encoder that a text such as ``clip:ViT-B-32`` names.

    Raises:
        InputError: If there is none of that name.
        EnvironmentFault: If its package or its weights are missing.
    """
    kind, _, name = text.partition(":")
    known = ("pixels", "clip:NAME", "timm:NAME")
    if kind not in ("pixels", "clip", "timm") or (kind == "pixels") != (text == "pixels"):
        raise InputError(
            f"encoder: {text!r} is unknown; set one of {', '.join(known)}{nearest(text, known)}"
        )
    with _installed("Pillow", "images"):
        import PIL.Image  # noqa: F401
    if kind == "pixels":
        return _pixels()
    if not name:
        raise InputError(f"encoder: {text!r} names no model; write {kind}:NAME")
    if kind == "timm":
        return _timm(name, device)
    name, _, weights = name.partition("/")
    return _clip(name, _clip_weights(name, weights), device)


@contextlib.contextmanager
def _installed(package: str, extra: str) -> Iterator[None]:
    """Name the mend if an import fails."""
    try:
        yield
    except ImportError as error:
        raise EnvironmentFault(
            f"this encoder needs {package}, which cannot be imported ({error}); run "
            f"`pip install 'recbole-mm[{extra}]'`"
        ) from error
    except (OSError, RuntimeError) as error:  # what torchvision says beside another torch
        raise EnvironmentFault(
            f"{package} cannot be imported ({error}); install the torchvision that was built for "
            "this torch, from the same index"
        ) from error


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    """The weights are fetched by the library that holds the model, which fails in many ways."""
    try:
        yield
    except Exception as error:
        raise EnvironmentFault(
            f"encoder: the weights of {name} cannot be loaded ({reason_of(error)}); check the "
            "network, or take --encoder pixels"
        ) from error


def _pixels() -> Encoder:
    """The picture at 16 x 16 points in RGB; the rest is done over all of them, by PCA.

    Weak features: they tell colour and layout, and nothing of what is shown.
    """
    from PIL import Image

    def prepare(image: Image.Image) -> Tensor:
        small = image.resize((_SIDE, _SIDE), Image.Resampling.BOX)
        return torch.from_numpy(np.asarray(small).reshape(-1).copy())  # (3 * 16 * 16,) uint8

    name = f"pixels {_SIDE}x{_SIDE} RGB, PCA (weak: colour and layout, not content)"
    metadata = {"encoder": name, "revision": f"pillow {version('pillow')}", "pooling": "none"}
    return Encoder(prepare, lambda batch: batch, metadata, draft=4 * _SIDE)


def _clip_weights(name: str, weights: str) -> str:
    """The weights asked for; those of OpenAI where none are named."""
    with _installed("open_clip", "clip"):
        import open_clip
    models = open_clip.list_models()
    if name not in models:
        raise InputError(f"encoder: open_clip has no model {name!r}{nearest(name, models)}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    weights = weights or "openai"
    if weights not in tags and not Path(weights).is_file():
        raise InputError(
            f"encoder: open_clip has no weights {weights!r} of {name}; write clip:{name}/WEIGHTS "
            f"with one of {', '.join(tags) or 'your own files'}"
        )
    return weights


def _clip(name: str, weights: str | None, device: torch.device) -> Encoder:
    """The image tower; rows are those that CLIP compares with texts, of length 1.

    Args:
        name: A model of open_clip.
        weights: Its tag for them, or a file; ``None`` for random numbers, in tests.
        device: Where it computes.
    """
    with _installed("open_clip", "clip"):
        import open_clip
    with _loading(f"{name}/{weights}"):
        model, _, prepare = open_clip.create_model_and_transforms(
            name, pretrained=weights, device=device
        )
    model.eval()

    def encode(batch: Tensor) -> Tensor:
        with torch.inference_mode():
            rows = model.encode_image(batch.to(device), normalize=True)
        return rows.float().cpu().clone()

    metadata = {
        "encoder": f"CLIP {name}",
        "revision": f"{weights} (open_clip {version('open_clip_torch')})",
        "pooling": "the model's own",
    }
    return Encoder(prepare, encode, metadata)


def _timm(name: str, device: torch.device, *, pretrained: bool = True) -> Encoder:
    """A model without its classifier; rows are its pooled features, at length 1.

    Args:
        name: A model of timm, with or without the tag of its weights.
        device: Where it computes.
        pretrained: False for random numbers, in tests.
    """
    with _installed("timm", "timm"):
        import timm
    if not timm.is_model(name):
        raise InputError(f"encoder: timm has no model {name!r}{nearest(name, timm.list_models())}")
    with _loading(name):
        model = timm.create_model(name, pretrained=pretrained, num_classes=0)
    model = model.eval().to(device)
    settings = timm.data.resolve_model_data_config(model)
    prepare = timm.data.create_transform(**settings, is_training=False)

    def encode(batch: Tensor) -> Tensor:
        with torch.inference_mode():
            rows = model(batch.to(device))
        return F.normalize(rows.float().flatten(1), dim=1).cpu().clone()

    tag = (model.pretrained_cfg or {}).get("tag") or "untagged"
    metadata = {
        "encoder": f"timm {name}",
        "revision": f"{tag if pretrained else 'random'} (timm {version('timm')})",
        "pooling": "the model's own",
    }
    return Encoder(prepare, encode, metadata)


def reason_of(error: Exception) -> str:
    """What to say of whatever a stranger's image, or a library, has raised."""
    said = (str(error).splitlines() or [""])[0][:200]
    if isinstance(error, OSError) and error.strerror:
        said = error.strerror
    if "UnidentifiedImage" in type(error).__name__:  # its text names an address in memory
        said = "no image that can be read here"
    return printable(said or type(error).__name__)
