"""The keys of a row as an index stores it, whatever the backend.

The user's metadata becomes columns under the user's own names, so keys that are not meant for filters begin with "r3_".
"""

from __future__ import annotations

VECTOR = "r3_vector"
CONTENT = "r3_content"
"""The text that is embedded and searched: title and text."""
METADATA = "r3_metadata"
"""The document's metadata as JSON."""
TEXT_HASH = "r3_text_hash"
"""Identifies what the model was given."""
ROW_HASH = "r3_row_hash"
"""Identifies the whole row apart from its source."""
SOURCE = "r3_source"
"""The name of the row's source (`index_sources`); null, meaning unknown, in indexes of format 1."""
COLUMNS = "r3_columns"
"""Only while a row is built, never stored: the values of its metadata columns."""
PLACE = "r3_place"
"""Only while a row is built, never stored: where its document was read, for messages."""
