"""Item images turned into features: what is read, what is refused, and what a run keeps."""

from __future__ import annotations

import io
import os
import sys

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from recbole_mm.data import image_encoders, images
from recbole_mm.data.feature_files import read_features
from recbole_mm.data.images import extract_images, item_tokens
from recbole_mm.errors import EnvironmentFault, InputError


def picture(seed, size=(24, 20)):
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures, a to l."""
    here = tmp_path / "images"
    here.mkdir()
    for seed, token in enumerate("abcdefghijkl"):
        picture(seed).save(here / f"{token}.png")
    return here


def extract(folder, tokens="abcdefghijkl", **options):
    options = {"dim": 4, "progress": False, **options}
    return extract_images(folder, folder.parent / "image.safetensors", list(tokens), **options)


def as_bytes(image, kind="PNG", **options):
    held = io.BytesIO()
    image.save(held, kind, **options)
    return held.getvalue()


def rgb(content):
    return np.asarray(images._rgb(content))


# ---------------------------------------------------------------------- one image


def test_transparency_is_white_in_every_form():
    clear = Image.new("RGBA", (4, 4), (10, 200, 30, 0))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 200, 30])
    grey = Image.new("LA", (4, 4), (9, 0))
    for content in (
        as_bytes(clear),
        as_bytes(palette, transparency=0),
        as_bytes(palette, "GIF", transparency=0),
        as_bytes(grey),
        as_bytes(clear, "WEBP", lossless=True),
    ):
        assert (rgb(content) == 255).all()


def test_sixteen_bits_are_scaled_and_not_clipped():
    levels = np.linspace(0, 65535, 16).astype(np.uint16).reshape(4, 4)
    found = rgb(as_bytes(Image.fromarray(levels)))[..., 0]
    assert (found == levels // 257).all()
    assert len(np.unique(found)) == 16


def test_cmyk_and_palette_keep_their_colour():
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    for content in (
        as_bytes(red.convert("CMYK"), "JPEG", quality=95),
        as_bytes(red.convert("P")),
        as_bytes(red, "BMP"),
    ):
        assert (np.abs(rgb(content).astype(int) - (255, 0, 0)) < 4).all()


def test_a_photograph_is_turned_upright():
    image = Image.new("RGB", (16, 32), "black")
    image.paste("white", (0, 0, 16, 16))  # its upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    found = rgb(as_bytes(image, "JPEG", exif=exif, quality=95))
    assert found.shape == (16, 32, 3)
    assert found[:, 24:].min() > 200  # what was above is on the right
    assert found[:, :8].max() < 50


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (as_bytes(Image.new("1", (9000, 9000))), "pixels"),
        (as_bytes(Image.new("1", (30_000, 2))), "a line"),
        (as_bytes(picture(0))[:400], ""),
        (as_bytes(picture(0), "JPEG")[:300], ""),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image"),
        (b"P6 9 9 255\n" + bytes(243), "no image"),  # a format of Pillow, but none of ours
        (b"<svg/>", "no image"),
    ],
    ids=["bomb", "line", "short-png", "short-jpeg", "eps", "ppm", "svg"],
)
def test_what_is_no_picture_is_refused(content, reason):
    with pytest.raises((ValueError, OSError)) as error:
        images._rgb(content)
    assert reason in image_encoders.reason_of(error.value)


# ---------------------------------------------------------------------- the folder


def test_rows_stand_at_their_items_and_alike_images_get_alike_rows(folder):
    picture(0).save(folder / "l.png")  # that of a
    done = extract(folder, tokens="lkjihgfedcbaxy")
    file = read_features(done.path)
    assert file.tokens == list("lkjihgfedcba")
    assert file.values.shape == (12, 4)
    assert file.metadata["normalised"] == "l2"
    assert "weak" in file.metadata["encoder"]
    torch.testing.assert_close(file.values.norm(dim=1), torch.ones(12))
    similar = file.values @ file.values.T
    assert similar[0, 11] == pytest.approx(1, abs=1e-6)
    assert similar.fill_diagonal_(0)[0].argmax() == 11
    assert (done.items, done.encoded, done.without_image, done.unknown) == (14, 12, 2, 0)


def test_the_same_images_give_the_same_bytes(folder):
    first = extract(folder).path.read_bytes()
    assert extract(folder).path.read_bytes() == first


def test_links_that_lead_out_are_not_followed(folder, tmp_path):
    picture(1).save(tmp_path / "secret.png")
    (folder / "a.png").unlink()
    (folder / "a.png").symlink_to(tmp_path / "secret.png")
    (folder / "b.png").unlink()
    (folder / "b.png").symlink_to(folder / "c.png")  # within: fine
    (folder / "d.png").unlink()
    os.mkfifo(folder / "d.png")
    done = extract(folder, max_failed=0.5)
    assert done.failed == {"a.png": "a link out of the folder", "d.png": "not a file"}
    assert read_features(done.path).tokens == list("bcefghijkl")
    assert done.listing.read_text() == "a.png\ta link out of the folder\nd.png\tnot a file\n"


def test_the_list_of_failures_goes_with_them(folder):
    (folder / "a.png").write_bytes(b"")
    assert extract(folder).listing.is_file()
    picture(0).save(folder / "a.png")
    assert extract(folder).listing is None
    assert sorted(p.name for p in folder.parent.iterdir()) == ["image.safetensors", "images"]


@pytest.mark.parametrize("name", ["a\nb", "\udcff"])
def test_odd_names_are_printable(folder, name):
    (folder / f"{name}.png").write_bytes(b"")
    done = extract(folder, tokens=[*"abcdefghijkl", name])
    assert len(done.listing.read_text().splitlines()) == 1
    assert all(line.isprintable() for line in done.lines())


def test_a_declaration_finds_the_file_and_owns_up_to_its_coverage(folder, tmp_path):
    done = extract(folder, tokens=[*"abcdefghijkl", *"12345678"])
    assert done.declaration(tmp_path) == (
        'modalities:\n  image: {path: "image.safetensors", min_coverage: 0.6}'
    )
    assert str(done.path) in done.declaration(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "pixel"}, "did you mean 'pixels'"),
        ({"encoder": "pixels:8"}, "is unknown"),
        ({"encoder": "timm:"}, "names no model"),
        ({"dim": 0}, "dim: 0"),
        ({"max_failed": 2}, "max_failed: 2"),
        ({"tokens": ["a.png"]}, "Names there: 'a', 'b', 'c'; items here: 'a.png'"),
    ],
)
def test_bad_arguments_are_named(folder, options, message):
    with pytest.raises(InputError, match=message):
        extract(folder, **options)
    assert [p.name for p in folder.parent.iterdir()] == ["images"]


def test_two_images_of_one_item_are_refused(folder):
    picture(0).save(folder / "a.JPG", "JPEG")
    with pytest.raises(InputError, match=r"'a' has two, a.JPG and a.png"):
        extract(folder)


def test_images_that_all_look_the_same_are_refused(folder):
    for path in folder.iterdir():
        Image.new("RGB", (8, 8), "red").save(path)
    with pytest.raises(InputError, match="look the same"):
        extract(folder)
    assert [p.name for p in folder.parent.iterdir()] == ["images"]


# ---------------------------------------------------------------------- interruptions


class Counted:
    """Counts the images that are read; stops at one of them."""

    def __init__(self, monkeypatch, stop_at=None):
        self.names, self.stop_at = [], stop_at
        self.read = images._content
        monkeypatch.setattr(images, "_content", self)

    def __call__(self, path, root):
        if path.stem == self.stop_at:
            raise KeyboardInterrupt
        self.names.append(path.stem)
        return self.read(path, root)


def test_an_interrupted_run_goes_on_and_ends_the_same(folder, monkeypatch):
    undisturbed = extract(folder).path
    expected = undisturbed.read_bytes()
    undisturbed.unlink()
    monkeypatch.setattr(images, "_PART", 4)
    with monkeypatch.context() as patch:
        Counted(patch, stop_at="g")
        with pytest.raises(KeyboardInterrupt):
            extract(folder)
    assert not undisturbed.exists()

    counted = Counted(monkeypatch)
    done = extract(folder)
    assert counted.names == list("efghijkl")
    assert done.kept == 4
    assert "(4 images read by an earlier run)" in done.lines()[0]
    assert done.path.read_bytes() == expected
    assert sorted(p.name for p in folder.parent.iterdir()) == ["image.safetensors", "images"]


def interrupted(folder, monkeypatch):
    """Two parts of four images each are kept; the third was being read."""
    monkeypatch.setattr(images, "_PART", 4)
    with monkeypatch.context() as patch:
        Counted(patch, stop_at="l")
        with pytest.raises(KeyboardInterrupt):
            extract(folder)
    parts = list((folder.parent / ".image.safetensors.parts").glob("*.safetensors"))
    assert len(parts) == 2
    return parts


def test_a_part_with_a_changed_image_is_read_anew(folder, monkeypatch):
    interrupted(folder, monkeypatch)
    picture(99).save(folder / "b.png")
    counted = Counted(monkeypatch)
    assert extract(folder).kept == 4
    assert counted.names == list("abcdijkl")


def test_a_damaged_part_is_read_anew(folder, monkeypatch):
    for part in interrupted(folder, monkeypatch):
        part.write_bytes(part.read_bytes()[:-9])
    counted = Counted(monkeypatch)
    assert extract(folder).kept == 0
    assert counted.names == list("abcdefghijkl")


def test_a_second_process_keeps_its_hands_off(folder, monkeypatch):
    parts = interrupted(folder, monkeypatch)
    with FileLock(parts[0].parent / ".lock"), pytest.raises(InputError, match="another process"):
        extract(folder)
    assert extract(folder).kept == 8


def test_it_stops_when_too_many_have_failed(folder, monkeypatch):
    for token in "abcd":
        (folder / f"{token}.png").write_bytes(b"")
    monkeypatch.setattr(images, "_PART", 4)
    counted = Counted(monkeypatch)
    with pytest.raises(InputError, match="4 of 12"):
        extract(folder)
    assert counted.names == list("abcd")


def test_a_folder_that_cannot_be_written_is_named(folder, monkeypatch):
    def full(*_):
        raise EnvironmentFault("x") from OSError(28, "No space left on device")

    monkeypatch.setattr(images.checkpoint, "write", full)
    with pytest.raises(EnvironmentFault, match=r"No space left.*--out"):
        extract(folder)


# ---------------------------------------------------------------------- the items


def test_items_come_from_item_and_from_inter(tmp_path):
    (tmp_path / "x.inter").write_text("user_id:token\titem_id:token\nu\tb\nu\tNA\nv\tb\n")
    assert item_tokens(tmp_path, "x") == ["b", "NA"]
    (tmp_path / "x.item").write_text("item_id:token\nc\nb\n")
    assert item_tokens(tmp_path, "x") == ["c", "b", "NA"]


# ---------------------------------------------------------------------- networks, random weights


def importable(package):
    """Skip without a package; that of torchvision fails otherwise beside another torch."""
    return pytest.importorskip(package, exc_type=(ImportError, RuntimeError))


def similar_to_the_last(encoder, folder):
    rows = images._encoded(sorted(folder.iterdir()), folder, encoder).rows
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))
    return (rows @ rows[-1])[:-1]


@pytest.mark.parametrize("batch", [5, 64])
def test_timm_gives_a_row_for_each_image(folder, monkeypatch, batch):
    importable("timm")
    monkeypatch.setattr(images, "_BATCH", batch)
    picture(0).save(folder / "l.png")
    encoder = image_encoders._timm("test_vit", torch.device("cpu"), pretrained=False)
    assert similar_to_the_last(encoder, folder).argmax() == 0
    assert "random" in encoder.metadata["revision"]


def test_timm_through_the_whole_command(folder, monkeypatch):
    importable("timm")
    random = image_encoders._timm("test_vit", torch.device("cpu"), pretrained=False)
    monkeypatch.setattr(image_encoders, "_timm", lambda *_: random)
    assert extract(folder, encoder="timm:test_vit", dim=None).width == 64
    assert extract(folder, encoder="timm:test_vit", dim=3).width == 3


def test_clip_gives_a_row_for_each_image(folder):
    importable("open_clip")
    picture(0).save(folder / "l.png")
    encoder = image_encoders._clip("ViT-S-32-alt", None, torch.device("cpu"))
    assert similar_to_the_last(encoder, folder).argmax() == 0


@pytest.mark.parametrize(
    ("package", "name", "message"),
    [
        ("timm", "timm:resnet5O", "did you mean 'resnet50'"),
        ("open_clip", "clip:ViT-B-3", "did you mean 'ViT-B-32'"),
        ("open_clip", "clip:ViT-B-32/openia", "openai, laion"),
        ("open_clip", "clip:ViT-S-32-alt", "your own files"),
    ],
)
def test_unknown_models_and_weights_are_named(folder, package, name, message):
    importable(package)
    with pytest.raises(InputError, match=message):
        extract(folder, encoder=name)


@pytest.mark.parametrize(
    ("missing", "encoder", "extra"),
    [("PIL", "pixels", "images"), ("timm", "timm:x", "timm"), ("open_clip", "clip:x", "clip")],
)
def test_a_missing_extra_is_named(folder, monkeypatch, missing, encoder, extra):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setitem(sys.modules, f"{missing}.Image", None)
    with pytest.raises(EnvironmentFault, match=rf"pip install 'recbole-mm\[{extra}\]'"):
        extract(folder, encoder=encoder)


def test_a_torchvision_of_another_torch_is_named():
    with (
        pytest.raises(EnvironmentFault, match="torchvision that was built for this torch"),
        image_encoders._installed("timm", "timm"),
    ):
        raise RuntimeError("operator torchvision::nms does not exist")
