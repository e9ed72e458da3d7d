"""The images of a pseudo-label table once more, under the ids they have there.

``lake.Collection`` makes ids of paths; a second table about the same images must not, or their rows
would not match where the first one's collection was a list or lay elsewhere.
"""

from collections.abc import Iterator

import pyarrow as pa

from pipeline.data.lake import INPUT_SCHEMA, Listing
from pipeline.data.pseudo_labels import iterate_labels, read_manifest
from pipeline.errors import DataError
from pipeline.storage import Location


class TableImages:
    """All images of a finished table, whatever became of them there.

    Raises:
        DataError: there is no finished table.
    """

    def __init__(self, folder: str) -> None:
        self._folder = Location.parse(folder)
        self._num_images = read_manifest(self._folder).rows

    @property
    def report(self) -> Listing:
        """What there is, as of a collection."""
        return Listing(
            root=str(self._folder),
            kind="labels",
            num_images=self._num_images,
            num_duplicates=0,
            ignored_by_extension={},
            num_unreadable_folders=0,
            unreadable_folders=[],
            num_refused_links=0,
            refused_links=[],
        )

    def chunks(self) -> Iterator[pa.Table]:
        """Tables of ``INPUT_SCHEMA``, one per file of the table.

        Raises:
            DataError: the table is empty or damaged.
        """
        if not self._num_images:
            raise DataError(f"{self._folder} has no rows: label some images first")
        for table in iterate_labels(self._folder, INPUT_SCHEMA.names):
            yield table.replace_schema_metadata(None).cast(INPUT_SCHEMA)
