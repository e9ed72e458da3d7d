"""Collections of every kind: stable ids, one report, and errors that say what was searched."""

import shutil
from pathlib import Path

import pytest

from pipeline.data.lake import Collection, Listing, image_id
from pipeline.data.sources import fetch_bytes
from pipeline.errors import ConfigError, DataError
from tests.data.conftest import ids_of, listed, plant

CANARY = "wJalrXUtnFEMI/K7MDENG"


def test_report_is_plain_json(tree: Path) -> None:
    report = listed(tree)[1]
    assert Listing.model_validate_json(report.model_dump_json()) == report


def test_chunks_hold_at_most_the_rows_asked_for(tree: Path) -> None:
    assert listed(tree, num_rows=1)[0] == listed(tree)[0]


def test_listing_again_counts_anew(tree: Path) -> None:
    collection = Collection(str(tree))
    assert len(list(collection.chunks())) == len(list(collection.chunks())) == 1
    assert collection.report.num_images == 4


def test_copy_of_the_tree_has_the_same_ids(tree: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tree, tmp_path / "elsewhere" / "copy")
    assert ids_of(tree) == ids_of(copy)
    assert ids_of(tree)[0] == image_id("top.webp")
    assert len(image_id("top.webp")) == 32


def test_ids_are_relative_to_the_root_of_a_link_and_of_a_glob(tree: Path) -> None:
    link = tree.parent / "link"
    link.symlink_to(tree)
    assert ids_of(link) == ids_of(tree)
    assert ids_of(tree / "b" / "*.jpg") == [image_id("cat.jpg")]


def test_empty_collection_says_what_it_ignored(tmp_path: Path) -> None:
    plant(tmp_path, "a.txt", "b.txt", "c.heic")
    with pytest.raises(DataError, match=r"no images in .*ignored: 2 \.txt, 1 \.heic"):
        listed(tmp_path)


def test_glob_without_a_match_names_the_pattern(tree: Path) -> None:
    with pytest.raises(DataError, match=r"no images in .*searched \*\.bmp"):
        listed(tree / "*.bmp")


@pytest.mark.parametrize("name", ["nowhere", "nowhere/*.jpg"])
def test_missing_place_is_a_data_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="nowhere"):
        Collection(str(tmp_path / name))


def test_file_of_another_kind_is_refused(tree: Path) -> None:
    with pytest.raises(DataError, match="got a file without extension"):
        Collection(str(tree / "b" / "README"))


def test_single_image_is_a_collection(tree: Path) -> None:
    uris, report = listed(tree / "a" / "cat.jpg")
    assert uris == [f"{tree}/a/cat.jpg"]
    assert report.kind == "file"


@pytest.mark.parametrize(
    "uri",
    [
        f"s3://AKIA:{CANARY}@bucket/x",
        f"https://u:{CANARY}@host/x",
        f"s3://bucket/x.jpg?X-Amz-Signature={CANARY}",
        f"s3://bucket/x.jpg?secret_key={CANARY}",
        f"https://host/x.jpg?sig={CANARY}",
    ],
)
def test_secrets_are_refused_and_not_repeated(tmp_path: Path, uri: str) -> None:
    (tmp_path / "list.txt").write_text(f"# a list\n{uri}\n")
    with pytest.raises(ConfigError) as whole:
        Collection(uri)
    with pytest.raises(DataError, match="line 2") as line:
        listed(tmp_path / "list.txt")
    fault = fetch_bytes([uri])[0]
    assert "MDENG" not in f"{whole.value} {line.value} {fault!r}"
