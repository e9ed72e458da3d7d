"""The images of a table keep the ids they have there."""

from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.data.lake import INPUT_SCHEMA, TableImages
from pipeline.errors import DataError
from tests.tables import label_row, write_table


def test_every_row_is_an_image_whatever_became_of_it(tmp_path: Path) -> None:
    first = [label_row("b"), label_row("a", status="error_read")]
    write_table(tmp_path, first, [label_row("c", status="no_object", uri="s3://lake/x.jpg")])
    images = TableImages(str(tmp_path))
    table = pa.concat_tables(list(images.chunks()))
    assert table.schema == INPUT_SCHEMA
    assert table["image_id"].to_pylist() == ["b", "a", "c"]
    assert table["uri"].to_pylist() == ["/photos/b", "/photos/a", "s3://lake/x.jpg"]
    assert (images.report.kind, images.report.num_images) == ("labels", 3)


def test_a_folder_without_a_finished_table_and_an_empty_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no _MANIFEST"):
        TableImages(str(tmp_path))
    write_table(tmp_path)
    with pytest.raises(DataError, match="has no rows"):
        list(TableImages(str(tmp_path)).chunks())
