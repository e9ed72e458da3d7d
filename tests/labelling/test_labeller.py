"""A batch of images becomes rows: every image one, in order, in original pixels."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.config import LocalizationConfig
from pipeline.data.masks import at_pixels
from pipeline.data.pixels import load_pixels
from pipeline.data.pseudo_labels import SCHEMA
from pipeline.labelling.labeller import (
    ForwardPass,
    Provenance,
    PseudoBoxLabeller,
)
from pipeline.labelling.outcomes import NOTHING_FOUND
from pipeline.localization.head import Head
from pipeline.models.backbones import build_backbone, load_weights
from pipeline.models.features import FeatureExtractor, PatchFeatures

DECODE: dict[str, Any] = {
    "min_side": 16,
    "max_side": 1024,
    "max_pixels": 10**8,
    "background": (255, 255, 255),
}
PROVENANCE = Provenance("run", "config", "weights")


class Brightness(FeatureExtractor):
    """Features a person can predict: a dark patch is unlike a bright one."""

    patch_size = 16

    def forward(self, images_B3HW: torch.Tensor) -> PatchFeatures:
        level_BHW = torch.nn.functional.avg_pool2d(images_B3HW.mean(1, keepdim=True), 16)[:, 0]
        return PatchFeatures(torch.stack([level_BHW, -level_BHW.abs() * 0], dim=-1), 16)


class Greedy(Brightness):
    """Runs out of memory for more than ``room`` images at once."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.sizes: list[int] = []

    def forward(self, images_B3HW: torch.Tensor) -> PatchFeatures:
        self.sizes.append(len(images_B3HW))
        if len(images_B3HW) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(images_B3HW)


class Broken(Brightness):
    """Features that are not finite, as fp16 overflow makes them."""

    def forward(self, images_B3HW: torch.Tensor) -> PatchFeatures:
        features = super().forward(images_B3HW)
        return PatchFeatures(features.tokens_BHWD * torch.nan, 16)


def write(path: Path, pixels: NDArray[np.uint8]) -> str:
    Image.fromarray(pixels).save(path)
    return str(path)


def dark_square(width: int, height: int, box: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    pixels = np.full((height, width, 3), 255, np.uint8)
    x0, y0, x1, y1 = box
    pixels[y0:y1, x0:x1] = 0
    return pixels


def decoded(uris: list[str], **changes: int) -> pa.Table:
    inputs = pa.table({"image_id": [str(i) for i in range(len(uris))], "uri": uris})
    return load_pixels(inputs, **{**DECODE, **changes})


def labeller(
    backbone: FeatureExtractor, *, batch_size: int | None = None, **localization: Any
) -> PseudoBoxLabeller:
    forward = ForwardPass("half", batch_size=batch_size)
    return PseudoBoxLabeller(
        backbone, LocalizationConfig(**localization), PROVENANCE, forward=forward
    )


def test_the_box_is_in_pixels_of_the_image(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.png", dark_square(160, 128, (32, 48, 80, 96)))
    row = labeller(Brightness())(decoded([uri])).to_pylist()[0]
    assert row["boxes"] == [[32.0, 48.0, 80.0, 96.0]]
    assert row["labels"] == [1]
    assert row["seed_xy"] == [40.0, 56.0]
    assert row["seed_degree"] == 8
    assert row["area_fraction"] == pytest.approx(48 * 48 / (160 * 128))
    assert row["touches_border"] is False
    assert 0 < row["scores"][0] <= 1


def test_a_scaled_down_image_has_its_box_in_original_pixels(tmp_path: Path) -> None:
    uri = write(tmp_path / "big.png", dark_square(1600, 1280, (320, 480, 800, 960)))
    table = decoded([uri], max_side=160)
    assert (table["pixel_columns"][0].as_py(), table["pixel_rows"][0].as_py()) == (160, 128)
    row = labeller(Brightness())(table).to_pylist()[0]
    assert (row["width"], row["height"]) == (1600, 1280)
    assert row["boxes"] == [[320.0, 480.0, 800.0, 960.0]]


def test_a_box_on_the_padding_is_clipped_to_the_image(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.png", dark_square(150, 121, (96, 64, 150, 121)))
    row = labeller(Brightness())(decoded([uri])).to_pylist()[0]
    assert row["boxes"] == [[96.0, 64.0, 150.0, 121.0]]
    assert row["touches_border"] is True


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_exif_orientations_give_the_same_box(tmp_path: Path, orientation: int) -> None:
    upright = Image.fromarray(dark_square(160, 128, (32, 48, 80, 96)))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    row = labeller(Brightness())(decoded([str(tmp_path / "a.png")])).to_pylist()[0]
    assert (row["width"], row["height"]) == (160, 128)
    assert row["exif_orientation"] == orientation
    assert row["boxes"] == [[32.0, 48.0, 80.0, 96.0]]


def test_rows_keep_their_order_and_bad_ones_their_status(tmp_path: Path) -> None:
    good = write(tmp_path / "good.png", dark_square(64, 64, (16, 16, 32, 32)))
    wide = write(tmp_path / "wide.png", dark_square(96, 64, (16, 16, 32, 32)))
    small = write(tmp_path / "small.png", dark_square(8, 64, (0, 0, 8, 8)))
    (tmp_path / "text.jpg").write_text("not a picture")
    uris = [str(tmp_path / "text.jpg"), wide, str(tmp_path / "gone.png"), good, small, wide]
    table = labeller(Brightness())(decoded(uris))
    assert table.schema == SCHEMA
    assert table["uri"].to_pylist() == uris
    assert table["image_id"].to_pylist() == ["0", "1", "2", "3", "4", "5"]
    assert table["status"].to_pylist() == [
        "error_decode",
        "ok",
        "error_read",
        "ok",
        "skipped_too_small",
        "ok",
    ]
    for row in table.to_pylist():
        has_result = row["status"] == "ok"
        assert (row["boxes"] is not None) == has_result
        assert (row["error"] is None) == has_result


def test_an_empty_block_is_an_empty_table() -> None:
    assert labeller(Brightness())(decoded([])).num_rows == 0


@pytest.mark.parametrize("shade", [0, 128, 255])
def test_a_uniform_image_has_no_nan_and_the_same_result_twice(tmp_path: Path, shade: int) -> None:
    uri = write(tmp_path / "flat.png", np.full((64, 64, 3), shade, np.uint8))
    network = labeller(build_backbone("vit_tiny_patch16_224", None))
    first, second = (network(decoded([uri])).drop_columns("created_at") for _ in range(2))
    assert first.equals(second)
    row = first.to_pylist()[0]
    assert row["status"] in ("ok", "no_object")
    assert not row["scores"] or np.isfinite(row["scores"][0])


def test_features_that_are_not_finite_are_no_object_with_a_reason(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.png", dark_square(64, 64, (16, 16, 32, 32)))
    row = labeller(Broken())(decoded([uri])).to_pylist()[0]
    assert (row["status"], row["error"], row["boxes"]) == ("no_object", NOTHING_FOUND["solost"], [])


def test_a_batch_too_big_for_memory_is_halved_until_it_fits(tmp_path: Path) -> None:
    uris = [write(tmp_path / f"{i}.png", dark_square(64, 64, (16, 16, 32, 32))) for i in range(7)]
    greedy = Greedy(room=2)
    table = labeller(greedy, batch_size=7)(decoded(uris))
    assert table["status"].to_pylist() == ["ok"] * 7
    assert greedy.sizes == [7, 3, 1, 2, 4, 2, 2]


def test_one_image_too_big_for_memory_costs_only_itself(tmp_path: Path) -> None:
    uris = [
        write(tmp_path / "big.png", dark_square(96, 64, (16, 16, 32, 32))),
        write(tmp_path / "ok.png", dark_square(64, 64, (16, 16, 32, 32))),
    ]

    class OnlySquare(Brightness):
        def forward(self, images_B3HW: torch.Tensor) -> PatchFeatures:
            if images_B3HW.shape[2] != images_B3HW.shape[3]:
                raise MemoryError
            return super().forward(images_B3HW)

    table = labeller(OnlySquare())(decoded(uris))
    assert table["status"].to_pylist() == ["error_memory", "ok"]
    assert "96x64 pixels" in table["error"][0].as_py()


def test_another_runtime_error_is_not_taken_for_a_lack_of_memory(tmp_path: Path) -> None:
    class Faulty(Brightness):
        def forward(self, images_B3HW: torch.Tensor) -> PatchFeatures:
            raise RuntimeError("shape mismatch")

    uri = write(tmp_path / "a.png", dark_square(64, 64, (16, 16, 32, 32)))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        labeller(Faulty())(decoded([uri]))


def test_only_images_of_one_padded_grid_share_a_forward(tmp_path: Path) -> None:
    shapes: list[tuple[int, ...]] = []

    class Watching(Brightness):
        def forward(self, images_B3HW: torch.Tensor) -> PatchFeatures:
            shapes.append(tuple(images_B3HW.shape))
            return super().forward(images_B3HW)

    sizes = [(64, 64), (60, 57), (96, 64), (64, 64), (64, 96), (64, 64)]
    uris = [
        write(tmp_path / f"{i}.png", dark_square(w, h, (0, 0, 16, 16)))
        for i, (w, h) in enumerate(sizes)
    ]
    labeller(Watching(), batch_size=3)(decoded(uris))
    assert sorted(shapes) == [(1, 3, 64, 64), (1, 3, 64, 96), (1, 3, 96, 64), (3, 3, 64, 64)]


def test_real_photos_get_the_same_boxes_alone_and_in_company(
    shared: Path, vit_tiny_weights: Path
) -> None:
    weights = load_weights("vit_tiny_patch16_224", str(vit_tiny_weights))
    network = build_backbone("vit_tiny_patch16_224", weights, feature="value", block=5)
    label = labeller(network)
    photos = sorted((shared / "data" / "voc07_test_500" / "images").iterdir())[:12]
    together = label(decoded([str(path) for path in photos]))
    for row, path in enumerate(photos):
        alone = label(decoded([str(path)]))
        assert alone["boxes"][0].as_py() == together["boxes"][row].as_py()


def true_mask(width: int, height: int, box: tuple[int, int, int, int]) -> NDArray[np.bool_]:
    return np.asarray(dark_square(width, height, box)[..., 0] == 0)


@pytest.mark.parametrize("rule", ["solost", "lost", "ncut"])
def test_a_mask_of_patches_is_the_objects_in_original_pixels(tmp_path: Path, rule: str) -> None:
    box = (320, 480, 800, 960)
    uri = write(tmp_path / "big.png", dark_square(1600, 1280, box))
    row = labeller(Brightness(), rule=rule, masks=True)(decoded([uri], max_side=160))
    masks = row.to_pylist()[0]["masks"]
    assert masks[0]["size"] == [8, 10]
    assert masks[0]["cell"] == [160.0, 160.0]
    assert np.array_equal(at_pixels(masks[0], 1600, 1280), true_mask(1600, 1280, box))


@pytest.mark.parametrize("rule", ["solost", "ncut"])
def test_a_refined_mask_has_edges_that_no_patch_has(tmp_path: Path, rule: str) -> None:
    # Not a multiple of the patch, on an image that is none either and was scaled down by two.
    box = (108, 140, 268, 246)
    uri = write(tmp_path / "a.png", dark_square(402, 310, box))
    table = decoded([uri], max_side=201)
    coarse, fine = (
        labeller(Brightness(), rule=rule, **{knob: True})(table).to_pylist()[0]["masks"][0]
        for knob in ("masks", "refine_masks")
    )
    assert fine["size"] == [155, 201]
    assert fine["cell"] == [2.0, 2.0]
    true_hw = true_mask(402, 310, box)
    overlap = [
        (mask_hw & true_hw).sum() / (mask_hw | true_hw).sum()
        for mask_hw in (at_pixels(coarse, 402, 310), at_pixels(fine, 402, 310))
    ]
    assert overlap[0] < 0.9
    assert overlap[1] > 0.98


def test_each_of_many_boxes_has_its_own_mask(tmp_path: Path) -> None:
    boxes = [(32, 48, 80, 96), (112, 16, 144, 48)]
    pixels = np.minimum(*(dark_square(160, 128, box) for box in boxes))
    uris = [write(tmp_path / "a.png", pixels), write(tmp_path / "b.png", 0 * pixels + 255)]
    chosen = LocalizationConfig(rule="head", max_objects=5, masks=True)
    # Dark patches point one way, bright ones the other.
    head = Head(np.array([-1.0, 0.0]), 0.0, 0.0, 0.1)
    rows = PseudoBoxLabeller(
        Brightness(), chosen, PROVENANCE, forward=ForwardPass("half"), head=head
    )(decoded(uris)).to_pylist()
    assert rows[0]["boxes"] == [list(box) for box in boxes]
    for box, mask in zip(boxes, rows[0]["masks"], strict=True):
        assert np.array_equal(at_pixels(mask, 160, 128), true_mask(160, 128, box))
    assert rows[1]["status"] == "no_object"
    assert not rows[1]["masks"]


def test_without_being_asked_for_there_are_no_masks(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.png", dark_square(160, 128, (32, 48, 80, 96)))
    assert labeller(Brightness())(decoded([uri])).to_pylist()[0]["masks"] is None
