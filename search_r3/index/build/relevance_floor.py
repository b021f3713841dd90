"""The cosine below which a hit says little: how close an index comes to questions that have nothing to do with it.

A model gives any two texts some cosine, which depends on the model and on the index. So the index is asked questions
from many fields, of which at most a few can be about its documents, and their best cosines are compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from search_r3.index.backends.index_backend import FloorRecord, IndexBackend, RelevanceFloor
from search_r3.index.encoder_protocol import Encoder

DEVIATIONS = 1.645
"""Standard deviations above the median: 95% of a normal distribution."""
MAD_OF_DEVIATION = 1.4826
"""A normal distribution's standard deviation as a multiple of its median absolute deviation."""
CHANGED = 0.1
"""Share of rows by which the index may grow or shrink before the floor is measured again."""
QUESTIONS = (
    "how long should bread dough rise in a cold kitchen",
    "which vaccines does a newborn need in the first year",
    "who won the football world cup in 1954",
    "how do I prune an old apple tree in winter",
    "what caused the fall of the Roman Republic",
    "how much notice must a landlord give a tenant",
    "why does the moon always show the same face",
    "what is the best way to learn to play the violin",
    "how are interest rates set by a central bank",
    "which shoes are good for running on wet trails",
    "what do octopuses eat in the deep sea",
    "how is parmesan cheese aged",
    "when do children lose their first teeth",
    "how do I get a red wine stain out of a carpet",
    "who painted the ceiling of the Sistine Chapel",
    "how far can a golden eagle fly in a day",
    "what should I pack for a week of hiking in Norway",
    "how does a catalytic converter clean exhaust gas",
    "why do leaves turn red in autumn",
    "what are the rules of offside in ice hockey",
    "how do I file taxes as a freelance photographer",
    "which plants grow well in a dark bathroom",
)
"""Questions from many fields."""
UNKNOWN_WORDS = (
    "qwxzv plorf dranth uvvik",
    "zzkt mmbn yyqo rrwx tthv",
    "grobble wint farsk",
    "hjkl poiu vbnm",
    "xanthil drobe ulmert sprak venn",
    "lorp",
    "tzik brumfel qaddo",
    "wexil yorr haspent crund",
)
"""Questions of words that no document has. A model places them elsewhere than words that it knows, often nearer."""


def measure_floor(backend: IndexBackend, model: Encoder) -> RelevanceFloor:
    """The cosines that `QUESTIONS` and `UNKNOWN_WORDS` reach in an index, asked without reasoning."""
    return RelevanceFloor(*(_upper(_best_cosines(texts, backend, model)) for texts in (QUESTIONS, UNKNOWN_WORDS)))


def _best_cosines(texts: Sequence[str], backend: IndexBackend, model: Encoder) -> list[float]:
    vectors = np.asarray(model.encode_query(list(texts), reasoning=False), dtype=np.float32)
    return [found[0][1] for vector in vectors if (found := backend.search(vector, 1))]


def _upper(values: Sequence[float]) -> float:
    """Below which 95% of such values lie, even if a quarter of `values` are outliers (an index about cooking is asked
    about cooking too): the median and the median absolute deviation, as of a normal distribution."""
    median = float(np.median(values))
    deviation = MAD_OF_DEVIATION * float(np.median(np.abs(np.asarray(values) - median)))
    return round(median + DEVIATIONS * deviation, 4)


def keep_floor(backend: IndexBackend, model: Encoder) -> None:
    """Measure the floor and store it with the index, unless about as many rows were there when that was done last.

    A model that embeds documents only, such as one that looks up vectors, leaves an index without a floor.
    """
    if not hasattr(model, "encode_query"):
        return
    rows, kept = backend.count(), backend.floor_record
    if rows and (kept is None or abs(rows - kept.rows) > CHANGED * kept.rows):
        backend.write_floor(FloorRecord(measure_floor(backend, model), rows, model.contract_hash))
