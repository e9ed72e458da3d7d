"""Folders and globs: every image once, in a fixed order, and everything else counted or named."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.data.folders import fits, may_hold
from pipeline.data.sources import fetch_bytes
from tests.data.conftest import below, listed, plant


def test_folder_lists_equal_names_twice_in_a_fixed_order(tree: Path) -> None:
    uris, report = listed(tree)
    assert below(tree, uris) == ["top.webp", "a/cat.jpg", "b/cat.jpg", "b/c/dog.PNG"]
    assert report.kind == "folder"
    assert report.root == str(tree)
    assert report.ignored_by_extension == {".txt": 1, "(none)": 1}


@pytest.mark.parametrize(
    "name", ["x.JPG", "x.jpeg", "x.TiFF", "x.webp", "x.jp2", "x.avif", "x.ico"]
)
def test_extensions_that_pillow_reads_are_images(tmp_path: Path, name: str) -> None:
    assert below(tmp_path, listed(plant(tmp_path, name))[0]) == [name]


@pytest.mark.parametrize("name", ["x.svg", "x.pdf", "x.eps", "x.heic", "x.h5", "x.mpg", "x.dcm"])
def test_other_extensions_are_counted_as_ignored(tmp_path: Path, name: str) -> None:
    report = listed(plant(tmp_path, name, "y.jpg"))[1]
    assert report.ignored_by_extension == {os.path.splitext(name)[1]: 1}


def test_order_is_that_of_the_names_whatever_the_disk_says(tmp_path: Path) -> None:
    names = [f"{number * 37 % 101:03d}.jpg" for number in range(101)]
    assert below(tmp_path, listed(plant(tmp_path, *names))[0]) == sorted(names)


def test_hidden_files_and_folders_are_ignored_and_counted(tmp_path: Path) -> None:
    uris, report = listed(plant(tmp_path, "._x.jpg", ".git/y.jpg", ".DS_Store", "z.jpg"))
    assert below(tmp_path, uris) == ["z.jpg"]
    assert report.ignored_by_extension == {"(hidden)": 3}


def test_pipe_named_like_an_image_is_ignored(tmp_path: Path) -> None:
    os.mkfifo(plant(tmp_path, "x.jpg") / "pipe.jpg")
    uris, report = listed(tmp_path)
    assert below(tmp_path, uris) == ["x.jpg"]
    assert report.ignored_by_extension == {"(special)": 1}


def test_many_different_extensions_do_not_lengthen_the_report(tmp_path: Path) -> None:
    report = listed(plant(tmp_path, "x.jpg", *(f"x.{n:04d}" for n in range(150))))[1]
    assert len(report.ignored_by_extension) == 101
    assert report.ignored_by_extension["(other)"] == 50


def test_link_loop_lists_every_image_once(tree: Path) -> None:
    (tree / "b" / "loop").symlink_to(tree)
    (tree / "b" / "self").symlink_to(tree / "b")
    uris, report = listed(tree)
    assert below(tree, uris) == ["top.webp", "a/cat.jpg", "b/cat.jpg", "b/c/dog.PNG"]
    assert report.num_duplicates == 0


def test_link_to_a_listed_image_is_a_duplicate(tree: Path) -> None:
    (tree / "a" / "again.jpg").symlink_to(tree / "b" / "cat.jpg")
    uris, report = listed(tree)
    assert f"{tree}/a/again.jpg" not in uris
    assert report.num_duplicates == 1


def test_links_to_a_blob_list_it_once_under_the_first_name(tmp_path: Path) -> None:
    plant(tmp_path, ".blobs/0a1b", ".blobs/deep/x.jpg", "keep.jpg")
    (tmp_path / "cat.jpg").symlink_to(".blobs/0a1b")
    (tmp_path / "same.jpg").symlink_to(".blobs/0a1b")
    (tmp_path / "deep").symlink_to(".blobs/deep")
    (tmp_path / "deep2").symlink_to(".blobs")
    uris, report = listed(tmp_path)
    assert below(tmp_path, uris) == ["keep.jpg", "cat.jpg", "deep/x.jpg"]
    assert report.num_duplicates == 1


def test_loop_below_a_hidden_folder_ends(tmp_path: Path) -> None:
    plant(tmp_path, ".store/x.jpg")
    (tmp_path / "open").symlink_to(".store")
    (tmp_path / ".store" / "round").symlink_to(tmp_path)
    (tmp_path / ".store" / "back").symlink_to(tmp_path / ".store")
    assert below(tmp_path, listed(tmp_path)[0]) == ["open/x.jpg"]


def test_links_out_of_the_root_and_to_nothing_are_refused_by_name(tree: Path) -> None:
    plant(tree.parent, "secret/private.jpg")
    (tree / "out.jpg").symlink_to(tree.parent / "secret" / "private.jpg")
    (tree / "outside").symlink_to(tree.parent / "secret")
    (tree / "gone.jpg").symlink_to(tree / "nowhere.jpg")
    (tree / "me.jpg").symlink_to(tree / "me.jpg")
    uris, report = listed(tree)
    assert len(uris) == 4
    assert report.num_refused_links == 4
    assert any(text.startswith(f"{tree}/gone.jpg (dangling") for text in report.refused_links)
    assert any(text.startswith(f"{tree}/outside -> ") for text in report.refused_links)


def test_neighbour_whose_name_begins_like_the_root_is_outside(tree: Path) -> None:
    plant(tree.parent, "tree2/x.jpg")
    (tree / "x.jpg").symlink_to(tree.parent / "tree2" / "x.jpg")
    assert listed(tree)[1].num_refused_links == 1


def test_root_that_is_a_link_itself_is_followed(tree: Path) -> None:
    link = tree.parent / "link"
    link.symlink_to(tree)
    uris, _ = listed(link)
    assert uris[0] == f"{link}/top.webp"


def test_examples_are_capped_and_counts_are_not(tree: Path) -> None:
    for number in range(30):
        (tree / f"{number}.jpg").symlink_to("/nowhere")
    report = listed(tree)[1]
    assert (report.num_refused_links, len(report.refused_links)) == (30, 20)


ODD_NAMES = ["sp ace.jpg", "per%20cent.jpg", "ha#sh.jpg", "new\nline.jpg", "Käse.jpg", "漢字.png",
             "q?x.jpg", "[1].jpg", "x" * 251 + ".jpg", "e\u0301.jpg"]  # fmt: skip


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_are_listed_and_read(tmp_path: Path, name: str) -> None:
    uris, _ = listed(plant(tmp_path, name))
    assert uris == [f"{tmp_path}/{name}"]
    assert fetch_bytes(uris) == [name.encode()]


def test_name_that_is_not_utf8_becomes_a_file_uri(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff%.jpg")).write_bytes(b"image")
    uris, _ = listed(tmp_path)
    assert uris == [f"file://{tmp_path}/a%FF%25.jpg"]
    assert fetch_bytes(uris) == [b"image"]


def test_name_that_reads_as_a_row_of_a_table_becomes_a_file_uri(tmp_path: Path) -> None:
    uris, _ = listed(plant(tmp_path, "x.parquet#3/y.jpg"))
    assert uris == [f"file://{tmp_path}/x.parquet%233/y.jpg"]
    assert fetch_bytes(uris) == [b"x.parquet#3/y.jpg"]


LIST = """
import sys
from pipeline.data.lake import Collection
from pipeline.data.sources import fetch_bytes
collection = Collection(sys.argv[1])
uris = [uri for chunk in collection.chunks() for uri in chunk["uri"].to_pylist()]
print(collection.report.num_unreadable_folders, collection.report.unreadable_folders, uris)
print(fetch_bytes([sys.argv[1] + "/locked.jpg"]))
"""


def without_root_powers() -> list[str]:
    """The start of a command that obeys file modes even where the tests run as root."""
    if os.getuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root reads every folder, and there is no setpriv to take that power away")
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]


def test_unreadable_folder_is_named_and_unreadable_file_is_a_fault(tmp_path: Path) -> None:
    plant(tmp_path, "open/x.jpg", "locked/y.jpg", "locked.jpg")
    tmp_path.joinpath("locked").chmod(0)
    tmp_path.joinpath("locked.jpg").chmod(0)
    command = [*without_root_powers(), sys.executable, "-c", LIST, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    tmp_path.joinpath("locked").chmod(0o755)
    assert f"1 ['{tmp_path}/locked (Permission denied)']" in done.stdout, done.stderr
    assert f"['{tmp_path}/locked.jpg', '{tmp_path}/open/x.jpg']" in done.stdout
    assert "[ReadFault(reason='permission denied')]" in done.stdout


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.webp", ["top.webp"]),
        ("*/cat.jpg", ["a/cat.jpg", "b/cat.jpg"]),
        ("[b-z]/*.jpg", ["b/cat.jpg"]),
        ("**/*.PNG", ["b/c/dog.PNG"]),
        ("b/**", ["b/cat.jpg", "b/c/dog.PNG"]),
        ("**/c/**/dog.???", ["b/c/dog.PNG"]),
    ],
)
def test_glob_lists_what_matches(tree: Path, pattern: str, expected: list[str]) -> None:
    uris, report = listed(tree / pattern)
    assert below(tree, uris) == expected
    assert report.kind == "glob"


def test_glob_takes_its_root_before_the_first_wildcard(tree: Path) -> None:
    assert listed(tree / "b" / "*.jpg")[1].root == str(tree / "b")


def test_glob_through_a_link_finds_what_it_would_not_find_otherwise(tree: Path) -> None:
    (tree / "link").symlink_to(tree / "b" / "c")
    assert below(tree, listed(tree / "*" / "*.PNG")[0]) == ["link/dog.PNG"]


def test_existing_folder_with_brackets_is_no_glob(tmp_path: Path) -> None:
    plant(tmp_path, "photos [2020]/x.jpg")
    assert listed(tmp_path / "photos [2020]")[1].kind == "folder"


@pytest.mark.parametrize("parts", ["a/b", "a/c/b", "a/c/d/b", "b", "a", "a/b/c"])
def test_double_star_stands_for_any_number_of_folders(parts: str) -> None:
    assert fits(parts.split("/"), ("a", "**", "b")) == (parts in ("a/b", "a/c/b", "a/c/d/b"))


def test_folder_that_cannot_match_is_not_entered() -> None:
    assert may_hold(["a"], ("a", "*.jpg"))
    assert not may_hold(["b"], ("a", "*.jpg"))
    assert not may_hold(["a", "b"], ("a", "*.jpg")[:1])
