"""Tables -> files: which images, under which names, with which weights, and what is told."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import timm
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file

from pipeline.config import DrawJob, LabelJob, LocalizationConfig
from pipeline.config.labelling import ResolvedBackbone
from pipeline.data.masks import encode
from pipeline.data.pixels import load_pixels, pixels_of_row
from pipeline.data.pseudo_labels import config_hash, read_labels, read_manifest
from pipeline.drawing.images import METHOD_COLOURS, THUMBNAIL
from pipeline.errors import ConfigError, DataError, StorageError, WeightsError
from pipeline.gallery.gallery import SHEET_NAME, draw_gallery, safe_name, sheet_of_boxes
from pipeline.gallery.maps import load_map_drawer
from pipeline.labelling.labeller import Provenance, PseudoBoxLabeller
from pipeline.labelling.saved_head import HeadRecord, encode_head, read_head
from pipeline.localization.head import Head
from pipeline.models.backbones import build_backbone, load_weights
from pipeline.storage import Location
from tests.tables import Row, write_table

NAME = "vit_tiny_patch16_224"
LARGEST_SIDE = 80

MakeTable = Callable[..., Path]


@pytest.fixture
def make_table(tmp_path: Path, tiny_weights: Path) -> MakeTable:
    """A finished table of images of dark noise, labelled by the real labeller."""

    def make(
        names: Sequence[str] = ("a.png", "b.png", "c.png"),
        *,
        checkpoint: str = str(tiny_weights),
        tracking: dict[str, str] | None = None,
        changes: dict[str, Row] | None = None,
        localization: LocalizationConfig | None = None,
        head: Head | None = None,
        config: dict[str, Any] | None = None,
    ) -> Path:
        folder = tmp_path / "photos"
        folder.mkdir(exist_ok=True)
        for number, name in enumerate(names):
            noise = np.random.default_rng(number).integers(0, 120, (90 + 16 * number, 160, 3))
            Image.fromarray(noise.astype(np.uint8)).save(folder / name, "PNG")
        job = LabelJob(
            images=str(folder),
            output=str(tmp_path / "labels"),
            backbone=ResolvedBackbone(name=NAME, checkpoint=checkpoint, feature="value", block=2),
            localization=localization or LocalizationConfig(),
        )
        uris = [str(folder / name) for name in names]
        rows, sha256 = label(uris, tiny_weights, job.localization, head)
        decides = job.what_decides_the_boxes(sha256) | {"decode.max_side": LARGEST_SIDE}
        config = decides | (config or {})
        write_table(
            tmp_path / "labels",
            changed(rows, changes or {}),
            config=config,
            config_hash=config_hash(config),
            weights_sha256=sha256,
            job=job.model_dump(mode="json"),
            tracking=tracking or {},
        )
        return tmp_path / "labels"

    return make


def label(
    uris: Sequence[str],
    tiny_weights: Path,
    localization: LocalizationConfig | None = None,
    head: Head | None = None,
) -> tuple[pa.Table, str]:
    """Rows of the label table, and the sha256 of the weights."""
    weights = load_weights(NAME, str(tiny_weights))
    inputs = pa.table({"image_id": [f"id{n}" for n in range(len(uris))], "uri": list(uris)})
    pixels = load_pixels(
        inputs, min_side=16, max_side=LARGEST_SIDE, max_pixels=10**6, background=(0, 0, 0)
    )
    backbone = build_backbone(NAME, weights, feature="value", block=2)
    labeller = PseudoBoxLabeller(
        backbone,
        localization or LocalizationConfig(),
        Provenance("r1", "c1", weights.sha256),
        head=head,
    )
    return labeller(pixels), weights.sha256


def changed(rows: pa.Table, changes: dict[str, Row]) -> list[Row]:
    """The rows with other values in those of some images."""
    return [row | changes.get(Path(row["uri"]).name, {}) for row in rows.to_pylist()]


def no_box(status: str) -> dict[str, Any]:
    return {"status": status, "boxes": [], "scores": [], "seed_xy": None}


def draw(labels: Path, **settings: Any) -> list[str]:
    """Draw beside the table; the names of what lies there afterwards."""
    job = DrawJob(labels=str(labels), output=str(labels.parent / "out"), **settings)
    assert draw_gallery(job) == 0
    return sorted(path.name for path in (labels.parent / "out").iterdir())


def test_every_image_gets_a_row_of_five_panels_and_the_sheet_has_them_all(
    make_table: MakeTable,
) -> None:
    labels = make_table()
    assert draw(labels) == ["0001-a.jpg", "0002-b.jpg", "0003-c.jpg", SHEET_NAME]
    with Image.open(labels.parent / "out" / "0001-a.jpg") as picture:
        assert picture.width > 5 * 400
    with Image.open(labels.parent / "out" / SHEET_NAME) as sheet:
        assert sheet.format == "PNG"
        assert 3 * 240 < sheet.width < 4 * 240


def test_boxes_in_original_pixels_lie_right_on_images_scaled_down_for_the_network(
    make_table: MakeTable,
) -> None:
    labels = make_table(("a.png",), changes={"a.png": {"boxes": [[32, 20, 64, 80]]}})
    assert read_labels(Location.parse(str(labels)))["width"].to_pylist() == [2 * LARGEST_SIDE]
    draw(labels)
    with Image.open(labels.parent / "out" / SHEET_NAME) as sheet:
        green = (abs(np.asarray(sheet).astype(int) - METHOD_COLOURS["solost"]) < 24).all(axis=-1)
        left = (sheet.width - THUMBNAIL[0]) // 2
    columns = np.flatnonzero(green.sum(axis=0) > 60) - left
    scale = THUMBNAIL[0] / (2 * LARGEST_SIDE)
    assert (columns[0], columns[-1] + 1) == pytest.approx((32 * scale, 64 * scale), abs=2)


def test_maps_come_from_the_very_features_that_made_the_boxes(make_table: MakeTable) -> None:
    labels = make_table()
    place = Location.parse(str(labels))
    drawer = load_map_drawer(place, read_manifest(place), None)
    row = read_labels(Location.parse(str(labels))).slice(0, 1)
    decoded = load_pixels(
        row, min_side=16, max_side=LARGEST_SIDE, max_pixels=10**6, background=(0, 0, 0)
    )
    pixels = pixels_of_row(decoded, 0)
    assert pixels is not None
    found = drawer.labeller.localize(drawer.labeller.extract([pixels]))
    assert int(found.degree_BN[0].min()) == row["seed_degree"][0].as_py()
    assert float(found.score_B[0]) == pytest.approx(row["scores"][0].as_py()[0], abs=1e-6)
    titles = [panel.title for panel in drawer.panels(pixels)]
    assert titles[2:] == ["LOST, k = 100", "SoLOST, m = 0.5"]
    # The seed's similar patches, counted by the rule and on the map, are as many.
    assert titles[1] == f"Similarity to the seed ({row['seed_degree'][0].as_py()} similar)"


def fitted_head(place: Location) -> Head:
    """Stored at ``place``: a head that finds something in noise."""
    head = Head(np.random.default_rng(0).normal(size=192), 0.0, 0.0, 0.5)
    data = encode_head(head)
    record = HeadRecord(
        run_id="r0",
        created_at="2026-01-02T00:00:00+00:00",
        config={},
        head_sha256=hashlib.sha256(data).hexdigest(),
        num_images=30,
        num_cut=30,
        share=0.5,
        auc=0.9,
        agreement=0.5,
        border=0.2,
        changes=(),
        refused=None,
        collection={},
        versions={},
    )
    place.child("head.safetensors").write_bytes(data)
    place.child("config.json").write_bytes(record.model_dump_json().encode())
    return head


def shown_panels(labels: Path) -> list[str]:
    place = Location.parse(str(labels))
    drawer = load_map_drawer(place, read_manifest(place), None)
    noise = np.random.default_rng(0).integers(0, 120, (45, 80, 3), dtype=np.uint8)
    return [panel.title for panel in drawer.panels(noise)]


def test_of_a_cut_its_map_is_drawn_and_its_mask_beside_solost(make_table: MakeTable) -> None:
    labels = make_table(localization=LocalizationConfig(rule="ncut", cut_threshold=0.9))
    assert shown_panels(labels) == [
        "NCut's map of objects",
        "NCut, tau = 0.9",
        "SoLOST, m = 0.5",
    ]
    assert draw(labels)[0] == "0001-a.jpg"


@pytest.mark.parametrize("elsewhere", [True, False])
def test_of_a_head_its_map_is_drawn_wherever_it_was_fitted(
    make_table: MakeTable, tmp_path: Path, elsewhere: bool
) -> None:
    folder = tmp_path / "head" if elsewhere else tmp_path / "labels" / "_head"
    place = Location.parse(str(folder))
    head = fitted_head(place)
    settings = LocalizationConfig(rule="head", head=str(folder) if elsewhere else None)
    sha256 = read_head(place)[1].head_sha256
    labels = make_table(
        localization=settings, head=head, config={"localization.head_sha256": sha256}
    )
    assert shown_panels(labels) == ["Head's map of objects", "Head", "SoLOST, m = 0.5"]


def test_without_the_tables_own_head_there_are_boxes_and_a_warning(
    make_table: MakeTable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    head = fitted_head(Location.parse(str(tmp_path / "labels" / "_head")))
    settings = LocalizationConfig(rule="head")
    make_table(localization=settings, head=head, config={"localization.head_sha256": 64 * "0"})
    assert draw(tmp_path / "labels")[0] == "0001-a.jpg"
    assert "_head is not what the table was made with" in caplog.text
    (tmp_path / "labels" / "_head" / "config.json").unlink()
    caplog.clear()
    draw(tmp_path / "labels")
    assert "no maps, only boxes and seeds" in caplog.text
    assert "holds no fitted head" in caplog.text


def test_a_refused_head_leaves_the_maps_of_the_cut(make_table: MakeTable) -> None:
    settings = LocalizationConfig(rule="ncut", cut_threshold=0.9)
    labels = make_table(localization=settings, config={"localization.head_refused": "too few"})
    assert shown_panels(labels)[1] == "NCut, tau = 0.9"


def test_masks_are_tinted_where_they_lie(make_table: MakeTable) -> None:
    mask_HW = np.zeros((10, 20), dtype=bool)
    mask_HW[2:6, 5:10] = True
    stored = encode(mask_HW, (2 * LARGEST_SIDE / 20, 90 / 10))
    changes = {"a.png": {"boxes": [[40, 18, 80, 54]], "masks": [stored]}}
    tinted = sheet_pixels(make_table(("a.png",), changes=changes))
    blank = {"a.png": {"boxes": [[40, 18, 80, 54]]}}
    plain = sheet_pixels(make_table(("a.png",), changes=blank))
    differs = abs(tinted - plain).sum(axis=-1) > 40
    rows, columns = np.flatnonzero(differs.any(axis=1)), np.flatnonzero(differs.any(axis=0))
    scale = THUMBNAIL[0] / (2 * LARGEST_SIDE)
    left, top = (tinted.shape[1] - THUMBNAIL[0]) // 2, rows[0] - 18 * scale
    # Inside the line of the box.
    assert columns[0] - left == pytest.approx(40 * scale, abs=5)
    assert columns[-1] + 1 - left == pytest.approx(80 * scale, abs=5)
    assert rows[-1] + 1 - top == pytest.approx(54 * scale, abs=8)
    assert differs[rows[0] + 8 : rows[-1] - 8, columns[0] + 8 : columns[-1] - 8].mean() > 0.9


def sheet_pixels(labels: Path) -> NDArray[np.int64]:
    draw(labels)
    with Image.open(labels.parent / "out" / SHEET_NAME) as sheet:
        return np.asarray(sheet.convert("RGB")).astype(np.int64)


@pytest.mark.parametrize(
    ("masks", "complaint"),
    [
        ([], None),
        (None, None),
        ([{"size": [9, 9], "counts": "ooo", "cell": [20, 20]}], "no run lengths of COCO's"),
        ([{"size": [9, 9], "counts": "01", "cell": [20, 20]}], "must be 0 or more and add up"),
        ([{"size": None, "counts": None, "cell": None}], "size must be two numbers"),
        (2 * [{"size": [9, 9], "counts": "a2", "cell": [20, 20]}], "2 masks for 1 boxes"),
    ],
)
def test_a_tables_damaged_mask_is_a_line(
    make_table: MakeTable, masks: Any, complaint: str | None
) -> None:
    labels = make_table(("a.png",), changes={"a.png": {"boxes": [[1, 1, 9, 9]], "masks": masks}})
    if complaint is None:
        draw(labels)
    else:
        with pytest.raises(DataError, match=complaint):
            draw(labels)


@pytest.mark.parametrize(
    ("number", "drawn"), [(2, ["0001-a.jpg", "0002-c.jpg"]), (1, ["0001-a.jpg"])]
)
def test_fewer_images_are_spread_over_the_table(
    make_table: MakeTable, number: int, drawn: list[str]
) -> None:
    assert draw(make_table(("d.png", "c.png", "b.png", "a.png")), num_images=number)[:-1] == drawn


def test_images_without_an_object_are_drawn_and_failed_ones_are_told(
    make_table: MakeTable, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = make_table(changes={"a.png": no_box("error_decode"), "b.png": no_box("no_object")})
    assert draw(labels) == ["0001-b.jpg", "0002-c.jpg", SHEET_NAME]
    assert "never drawn: 1 error_decode" in capsys.readouterr().out


def test_without_the_weights_boxes_are_drawn_and_one_line_warns(
    make_table: MakeTable, caplog: pytest.LogCaptureFixture
) -> None:
    labels = make_table(checkpoint="/moved/away.safetensors")
    with caplog.at_level(logging.WARNING, "pipeline"):
        assert SHEET_NAME in draw(labels)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "/moved/away.safetensors" in caplog.text
    assert caplog.text.count("\n") == 1
    with Image.open(labels.parent / "out" / "0001-a.jpg") as picture:
        assert picture.width < 2 * 400


def test_weights_given_by_hand_take_the_place_of_those_that_moved(
    make_table: MakeTable, tiny_weights: Path
) -> None:
    labels = make_table(checkpoint="/moved/away.safetensors")
    draw(labels, checkpoint=str(tiny_weights))
    with Image.open(labels.parent / "out" / "0001-a.jpg") as picture:
        assert picture.width > 5 * 400


def test_other_weights_given_by_hand_are_refused(
    make_table: MakeTable, tiny_weights: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    state = timm.create_model(NAME, num_classes=0).state_dict()
    save_file({name: tensor + 1 for name, tensor in state.items()}, other)
    labels = make_table()
    with pytest.raises(WeightsError, match="not what the table was made with"):
        draw(labels, checkpoint=str(other))
    with pytest.raises(WeightsError, match="cannot be read"):
        draw(labels, checkpoint=str(tmp_path / "none.safetensors"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("/photos/cat.jpg", "0008-cat.jpg"),
        ("s3://bucket/a b/c d.JPEG", "0008-c_d.jpg"),
        ("/data/x.parquet#7/cat.jpg", "0008-cat.jpg"),
        ("/data/x.parquet#7", "0008-x.parquet_7.jpg"),
        ("../../x", "0008-x.jpg"),
        ("/photos/..", "0008-image.jpg"),
        ("C:\\photos\\cat.png", "0008-cat.jpg"),
        ("/photos/a\nb\x00\x1b[31m.png", "0008-a_b_31m.jpg"),
        ("/photos/写真.png", "0008-写真.jpg"),
        ("/photos/\udcff.png", "0008-image.jpg"),
        ("", "0008-image.jpg"),
    ],
)
def test_a_pictures_name_is_harmless_whatever_the_uri_says(uri: str, name: str) -> None:
    assert safe_name(7, uri) == name


@pytest.mark.parametrize("letter", ["x", "写", "."])
def test_long_names_are_cut_and_still_unique(letter: str) -> None:
    uri = "/photos/" + 200 * letter + ".png"
    names = {safe_name(index, uri) for index in range(3)}
    assert len(names) == 3
    assert all(len(name.encode()) < 150 for name in names)


def test_missing_and_changed_images_are_skipped_and_told(
    make_table: MakeTable, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    labels = make_table()
    (tmp_path / "photos" / "a.png").unlink()
    Image.new("RGB", (64, 64)).save(tmp_path / "photos" / "b.png")
    assert draw(labels) == ["0003-c.jpg", SHEET_NAME]
    told = capsys.readouterr().out
    assert "skipped 2 of 3 images: 1 changed since it was labelled, 1 not found" in told


def test_no_image_left_is_an_error_that_names_one(make_table: MakeTable, tmp_path: Path) -> None:
    labels = make_table()
    for path in (tmp_path / "photos").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"none of the 3 chosen .*3 not found.*a\.png"):
        draw(labels)
    failed = make_table(changes=dict.fromkeys(("a.png", "b.png", "c.png"), no_box("error_read")))
    with pytest.raises(DataError, match=r"no image that was labelled \(3 error_read\)"):
        draw(failed)


def test_earlier_pictures_are_replaced_and_files_of_others_stay(
    make_table: MakeTable, tmp_path: Path
) -> None:
    labels = make_table(("a.png",))
    out = tmp_path / "out"
    out.mkdir()
    (out / "0001-a.jpg").write_bytes(b"old")
    (out / "mine.txt").write_text("mine")
    assert draw(labels) == ["0001-a.jpg", SHEET_NAME, "mine.txt"]
    assert (out / "0001-a.jpg").stat().st_size > 1000
    assert (out / "mine.txt").read_text() == "mine"


def test_the_output_must_be_a_folder_of_its_own(make_table: MakeTable, tmp_path: Path) -> None:
    labels = make_table(("a.png",))
    with pytest.raises(ConfigError, match="own folder"):
        draw_gallery(DrawJob(labels=str(labels), output=f"{labels}/"))
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="must be a folder"):
        draw_gallery(DrawJob(labels=str(labels), output=str(tmp_path / "file")))
    photos = Path(read_labels(Location.parse(str(labels)))["uri"][0].as_py()).parent
    with pytest.raises(ConfigError, match="holds the images themselves"):
        draw_gallery(DrawJob(labels=str(labels), output=str(photos)))


def test_a_sheet_for_the_labelling_job_needs_neither_weights_nor_all_images(
    make_table: MakeTable, tmp_path: Path
) -> None:
    rows = read_labels(Location.parse(str(make_table())))
    (tmp_path / "photos" / "a.png").unlink()
    sheet = sheet_of_boxes(rows)
    assert sheet is not None
    with Image.open(BytesIO(sheet)) as picture:
        assert picture.format == "PNG"
        assert 2 * 240 < picture.width < 3 * 240
    one = sheet_of_boxes(rows.sort_by([("uri", "descending")]), limit=1)
    assert one is None, "the one chosen, a.png, is gone"


def test_a_sheet_of_nothing_is_none(make_table: MakeTable) -> None:
    labels = make_table(("a.png",), changes={"a.png": no_box("no_object")})
    rows = read_labels(Location.parse(str(labels)))
    assert sheet_of_boxes(rows) is None
    assert sheet_of_boxes(rows.slice(0, 0)) is None


def test_without_the_tables_database_nothing_is_recorded_and_none_is_made(
    make_table: MakeTable, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    database = tmp_path / "gone" / "mlflow.db"
    labels = make_table(("a.png",), tracking={"uri": f"sqlite:///{database}", "run_id": "0" * 32})
    draw(labels)
    assert f"not recorded in MLflow: there is no {database}" in caplog.text
    caplog.clear()
    draw(labels, tracking_uri="off")
    assert caplog.text == ""
    assert not database.parent.exists()


@pytest.mark.slow
def test_the_pictures_land_in_the_labelling_run(
    make_table: MakeTable, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("e", artifact_location=str(tmp_path / "artifacts"))
    run_id = client.create_run(experiment).info.run_id
    labels = make_table(("a.png",), tracking={"uri": uri, "run_id": run_id})
    names = draw(labels)
    recorded = [Path(file.path).name for file in client.list_artifacts(run_id, "pictures")]
    assert sorted(recorded) == names == ["0001-a.jpg", SHEET_NAME]
    assert client.get_run(run_id).info.status == "FINISHED"
    assert f"MLflow run {run_id}" in capsys.readouterr().out
