"""Any file opens as upright RGB or has a one-line error; tiles equal those of Idefics3."""

from __future__ import annotations

import random
import resource
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import Idefics3ImageProcessorPil

from config_tools import InputError
from configs import VLMConfig
from data.images import fit_longest, normalise, open_image, tile, tile_grid

ROOT = Path(__file__).parent.parent.parent
NOT_IMAGES = {"", ".txt", ".json", ".md", ".readme"}
EXTREME = [(5, 9), (120, 30), (70, 100), (1, 300), (300, 1), (1, 1), (2, 1), (48, 48), (128, 128)]


def config(tile_size: int, longest: int) -> VLMConfig:
    return VLMConfig(vit_img_size=tile_size, vit_patch_size=tile_size // 4, max_img_size=longest)


# --- Tiles --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile_size, longest", [(32, 128), (48, 48), (16, 96), (40, 80)])
def test_tiles_and_pixels_match_transformers(tile_size, longest, noise):
    cfg, rng = config(tile_size, longest), random.Random(tile_size)
    reference = Idefics3ImageProcessorPil(
        size={"longest_edge": longest},
        max_image_size={"longest_edge": tile_size},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    sizes = EXTREME + [(rng.randint(1, 300), rng.randint(1, 300)) for _ in range(60)]
    for seed, size in enumerate(sizes):
        image = noise(*size, seed)
        want = reference([image], return_tensors="pt", return_row_col_info=True)
        tiles, (rows, cols) = tile(image, cfg)
        assert (rows, cols) == (want["rows"][0][0], want["cols"][0][0]), size
        assert tile_grid(*size, cfg) == (rows, cols), size
        assert tiles.dtype == np.uint8 and tiles.shape[1:] == (tile_size, tile_size, 3)
        normalised = normalise(tiles.copy(), cfg)
        assert normalised.shape == want["pixel_values"][0].shape, size
        assert (normalised - want["pixel_values"][0]).abs().max() <= 1e-6, size


def test_grid_of_the_460m_preset_without_pixels():
    """At 512 / 2048 pixels, including edges beyond the 4096 limit."""
    cfg = VLMConfig(vit_img_size=512, vit_patch_size=16, max_img_size=2048)
    reference = Idefics3ImageProcessorPil(
        size={"longest_edge": 2048}, max_image_size={"longest_edge": 512}
    )
    rng = random.Random(0)
    sizes = EXTREME + [(rng.randint(1, 5000), rng.randint(1, 5000)) for _ in range(500)]
    for width, height in sizes:
        _, rows, cols = reference.get_number_of_image_patches(height, width, {})
        assert tile_grid(width, height, cfg) == ((rows, cols) if rows * cols > 1 else (0, 0))


@pytest.mark.parametrize("size", [(9000, 10), (10, 9000), (9000, 8999), (9000, 9000)])
def test_no_edge_grows_beyond_4096(size):
    width, height = fit_longest(*size, 9000)
    assert max(width, height) == 4096
    assert abs(width / height - size[0] / size[1]) <= 0.15 * size[0] / size[1]


def test_tiles_are_in_row_major_order_with_the_global_view_last():
    """Four uniform quarters of the tile size are returned unchanged, in reading order."""
    cfg = config(16, 32)
    quarters = np.array([[10, 90], [170, 250]], dtype=np.uint8)
    pixels = quarters.repeat(16, 0).repeat(16, 1)[..., None].repeat(3, 2)
    tiles, at = tile(Image.fromarray(pixels), cfg)
    assert at == (2, 2) and len(tiles) == 5
    assert [np.unique(t).tolist() for t in tiles[:4]] == [[10], [90], [170], [250]]
    corners = tiles[4][[0, 0, -1, -1], [0, -1, 0, -1], 0]
    assert np.abs(corners.astype(int) - [10, 90, 170, 250]).max() <= 12


def test_normalise_maps_black_and_white():
    cfg = VLMConfig(vit_image_mean=(0.5, 0.25, 0.0), vit_image_std=(0.5, 0.25, 1.0))
    black_white = np.stack([np.zeros((4, 4, 3)), np.full((4, 4, 3), 255)]).astype(np.uint8)
    x = normalise(black_white, cfg)
    assert x.shape == (2, 3, 4, 4) and x.is_contiguous()
    assert x[:, :, 0, 0].tolist() == [[-1, -1, 0], [1, 3, 1]]


# --- Opening ------------------------------------------------------------------------------------


def image_files(folder):
    return [
        f for f in sorted(folder.rglob("*")) if f.is_file() and f.suffix.lower() not in NOT_IMAGES
    ]


def test_every_shared_image_opens_as_rgb(shared):
    files = image_files(shared / "images")
    assert len(files) > 250
    for file in files:
        image = open_image(file)
        assert image.mode == "RGB" and min(image.size) >= 1, file
        assert np.asarray(image).shape == (image.height, image.width, 3), file


def test_simple_modes_match_pillow(shared):
    """Without alpha, rotation or more than 8 bits, `Image.convert` is correct."""
    names = ["hopper.bmp", "hopper.gif", "hopper.ppm", "hopper_gray.jpg", "hopper_g4.tif"]
    names += ["pil_sample_cmyk.jpg", "hopper_8bit.pgm", "flower.webp", "tiff_strip_cmyk_jpeg.tif"]
    for name in names:
        path = shared / "images" / "pillow_modes" / name
        want = np.asarray(Image.open(path).convert("RGB"))
        assert np.array_equal(np.asarray(open_image(path)), want), name


def test_the_same_image_in_many_formats(shared):
    folder = shared / "images" / "pillow_modes"
    want = np.asarray(open_image(folder / "hopper.png").resize((16, 16)), dtype=float)
    names = ("hopper.jpg", "hopper.webp", "hopper.avif", "hopper.bmp", "hopper.gif")
    for name in names:
        got = np.asarray(open_image(folder / name).resize((16, 16)), dtype=float)
        assert np.abs(got - want).mean() < 12, name
    grey = want @ [0.299, 0.587, 0.114]
    for name in ("hopper_16bit.pgm", "hopper_gray.jpg", "hopper_8bit.pgm", "hopper_gray_4bpp.tif"):
        got = np.asarray(open_image(folder / name).resize((16, 16)), dtype=float)
        assert np.abs(got - grey[..., None]).mean() < 12, name


def test_exif_orientations_come_out_upright(shared):
    folder = shared / "images" / "exif_orientation"
    looks = []
    for i in range(9):
        image = open_image(folder / f"Landscape_{i}.jpg")
        assert image.size == (1800, 1200), i
        looks.append(np.asarray(image.resize((30, 20), Image.Resampling.BOX), dtype=float))
    for i, look in enumerate(looks[1:], 1):
        assert np.abs(look - looks[1]).mean() < 6, f"Landscape_{i}"
        # Control: a flipped image differs a lot.
        assert np.abs(look[:, ::-1] - looks[1]).mean() > 20
        assert np.abs(look[::-1] - looks[1]).mean() > 20
    assert {open_image(folder / f"Portrait_{i}.jpg").size for i in (6, 8)} == {(1200, 1800)}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_exif_orientation(tmp_path, orientation, noise):
    """An image stored in each EXIF orientation opens upright."""
    upright = noise(7, 4, 3)
    stored = {
        1: lambda x: x,
        2: lambda x: x.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda x: x.transpose(Image.Transpose.ROTATE_180),
        4: lambda x: x.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda x: x.transpose(Image.Transpose.TRANSPOSE),
        6: lambda x: x.transpose(Image.Transpose.ROTATE_90),
        7: lambda x: x.transpose(Image.Transpose.TRANSVERSE),
        8: lambda x: x.transpose(Image.Transpose.ROTATE_270),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), np.asarray(upright))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_keeps_its_scale(tmp_path, suffix):
    values = np.array([[0, 257 * 64, 257 * 128, 65535], [257, 257 * 2, 65535, 0]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    image = np.asarray(open_image(tmp_path / f"a.{suffix}"))
    assert image[..., 0].tolist() == [[0, 64, 128, 255], [1, 2, 255, 0]]
    assert (image == image[..., :1]).all()
    Image.fromarray(values // 4).save(tmp_path / f"dark.{suffix}")  # keeps its scale
    assert open_image(tmp_path / f"dark.{suffix}").getextrema()[0] == (0, 64)
    Image.fromarray(values // 300).save(tmp_path / f"night.{suffix}")  # no value above 255
    assert open_image(tmp_path / f"night.{suffix}").getextrema()[0] == (0, 1)


def test_float_grey_is_scaled_by_its_own_range():
    values = np.array([[-1.0, 0.0, 1.0, np.nan]], dtype=np.float32)
    assert np.asarray(open_image(Image.fromarray(values)))[0, :, 0].tolist() == [0, 128, 255, 128]
    flat = np.full((2, 2), 1e9, dtype=np.float32)
    assert open_image(Image.fromarray(flat)).size == (2, 2)


def test_transparency_is_blended_with_white():
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0, :, 3] = [0, 128, 255]
    assert np.asarray(open_image(Image.fromarray(rgba)))[0, :, 0].tolist() == [255, 127, 0]
    grey = Image.fromarray(rgba[..., [0, 3]], mode="LA")
    assert np.asarray(open_image(grey))[0, :, 0].tolist() == [255, 127, 0]


def test_palette_and_colour_key_transparency(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 0, 200])
    palette.putdata([0, 1])
    palette.save(tmp_path / "plain.png")
    palette.save(tmp_path / "clear.png", transparency=0)
    assert np.asarray(open_image(tmp_path / "plain.png"))[0].tolist() == [[200, 0, 0], [0, 0, 200]]
    seen = np.asarray(open_image(tmp_path / "clear.png"))[0].tolist()
    assert seen == [[255, 255, 255], [0, 0, 200]]
    Image.new("RGB", (1, 1), (9, 8, 7)).save(tmp_path / "key.png", transparency=(9, 8, 7))
    assert np.asarray(open_image(tmp_path / "key.png"))[0, 0].tolist() == [255, 255, 255]


def test_cmyk_one_bit_and_first_frame(tmp_path):
    ink = np.array([[[0, 0, 0, 0], [255, 255, 0, 0], [0, 0, 0, 255]]], dtype=np.uint8)
    cmyk = np.asarray(open_image(Image.fromarray(ink, mode="CMYK")))[0].tolist()
    assert cmyk == [[255, 255, 255], [0, 0, 255], [0, 0, 0]]
    assert open_image(Image.new("1", (2, 2), 1)).getpixel((0, 0)) == (255, 255, 255)
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "lime", "blue")]
    for suffix in ("gif", "webp", "tif"):
        path = tmp_path / f"a.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
        r, g, b = open_image(path).getpixel((1, 1))
        assert r > 240 and max(g, b) < 15, suffix


def test_the_bytes_of_a_file_open_like_the_file(tmp_path, shared):
    folder = shared / "images"
    for name in ("exif_orientation/Portrait_6.jpg", "pillow_modes/hopper.Lab.tif"):
        want = open_image(folder / name)
        assert open_image((folder / name).read_bytes()).tobytes() == want.tobytes()
    with pytest.raises(InputError, match=r"row 3, image 2: not a readable image"):
        open_image(b"not an image", "row 3, image 2")


def test_no_external_program_is_started(tmp_path, monkeypatch):
    """Pillow would open an EPS file with Ghostscript."""
    monkeypatch.setattr("subprocess.Popen", None)
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    with pytest.raises(InputError, match=r"a\.png: not a readable image \(supported formats: JPEG"):
        open_image(tmp_path / "a.png")


def test_a_pil_image_is_not_modified(noise):
    image = noise(6, 5)
    image.getexif()[0x0112] = 6
    before = image.tobytes()
    assert open_image(image).size == (5, 6)
    assert image.size == (6, 5) and image.tobytes() == before


# --- Errors -------------------------------------------------------------------------------------


def test_each_corrupt_file_opens_or_has_a_one_line_error(shared):
    opened = refused = 0
    for file in sorted(f for f in (shared / "corrupt").rglob("*") if f.is_file()):
        try:
            image = open_image(file)
        except InputError as error:
            message = str(error)
            assert str(file) in message and "\n" not in message and message.endswith("."), message
            assert len(message) < 200 + len(str(file)) * 2, message
            refused += 1
        else:
            assert image.mode == "RGB" and np.asarray(image).shape[2] == 3, file
            opened += 1
    assert opened > 20 and refused > 60


GUARDED = """
import resource, sys, time
from data.images import open_image
from config_tools import InputError
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
for file in sys.argv[1:]:
    start = time.process_time()
    try:
        open_image(file)
    except InputError as error:
        assert "Memory" not in str(error), error
    print(f"{time.process_time() - start:.3f}", file)
"""


def test_each_corrupt_file_takes_less_than_two_seconds_and_a_gibibyte(shared):
    """Run in a process that may allocate one more GiB; CPU time excludes other processes."""
    files = sorted(str(f) for f in (shared / "corrupt").rglob("*") if f.is_file())
    done = subprocess.run([sys.executable, "-c", GUARDED, *files], capture_output=True, text=True,
                          cwd=ROOT, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    slowest = max((float(line.split()[0]), line) for line in done.stdout.splitlines())
    print(slowest)
    assert done.stdout.count("\n") == len(files) > 130 and slowest[0] < 2


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
def test_not_an_image(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.png: not a readable image"):
        open_image(tmp_path / "x.png")


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.png: no such file"):
        open_image(tmp_path / "nowhere.png")
    with pytest.raises(InputError, match="not a readable image"):
        open_image(str(tmp_path))


@pytest.mark.parametrize("width, height", [(60_000, 60_000), (12_000, 8_000), (2**31 - 1, 1)])
def test_a_decompression_bomb_is_an_error_without_allocation(tmp_path, width, height):
    """A small PNG with a huge declared size, below and above Pillow's hard limit."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        sum_ = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + sum_

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=r"bomb\.png.*pixels"):
        open_image(tmp_path / "bomb.png")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB


def test_an_image_just_below_the_limit_opens():
    assert open_image(Image.new("L", (9000, 9000))).size == (9000, 9000)
