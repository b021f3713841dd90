"""Validation on dev pools during training: retrieval quality without and with reasoning, and statistics of reasoning
traces and embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from search_r3 import metrics
from search_r3.data.beir import BeirDataset
from search_r3.data.dev_pools import dev_pool
from search_r3.data.io.hub_beir import with_nanobeir
from search_r3.ranking import top_k
from search_r3.training.losses import alignment, uniformity
from search_r3.training_curves import ERROR


def load_dev_pools(config: Any) -> list[BeirDataset]:
    """The dev pools of a recipe: its `dev` ("nanobeir" is all its parts), `data_root`, `dev_queries` and
    `dev_documents`.
    """
    names = with_nanobeir(config.dev)
    return [dev_pool(name, config.data_root, config.dev_queries, config.dev_documents, 0) for name in names]


def dev_metrics(
    encoder: Any, pools: Sequence[BeirDataset], max_document_tokens: int, max_reasoning_tokens: int
) -> dict[str, float]:
    """`pool_metrics` of every pool as "POOL.NAME", and the mean nDCG@10 over the pools as "ndcg@10.MODE", with its
    standard error as "ndcg@10.MODE_se".

    The modes are "off", "on" and, if the checkpoint has them, "latent" and "read". Without pools, {}.
    """
    values: dict[str, float] = {}
    for pool in pools:
        of_pool = pool_metrics(encoder, pool, max_document_tokens, max_reasoning_tokens)
        values |= {f"{pool.name}.{name}": value for name, value in of_pool.items()}
    modes = ("off", "on", *(["latent"] if encoder.latent_steps else []), *(["read"] if encoder.reading else []))
    for mode in modes if pools else ():
        values[f"ndcg@10.{mode}"] = float(np.mean([values[f"{pool.name}.{mode}"] for pool in pools]))
        errors_P = np.array([values[f"{pool.name}.{mode}{ERROR}"] for pool in pools])
        values[f"ndcg@10.{mode}{ERROR}"] = float(np.sqrt((errors_P**2).sum()) / len(pools))
    return values


def pool_metrics(
    encoder: Any, pool: BeirDataset, max_document_tokens: int, max_reasoning_tokens: int
) -> dict[str, float]:
    """Validation metrics of `encoder` on one dev pool.

    Args:
        encoder: a SearchR3.
        max_document_tokens: documents are truncated to this many tokens.
        max_reasoning_tokens: the most reasoning tokens per query.

    Returns:
        nDCG@10 without ("off") and with ("on") reasoning, with the reasoning that the data set gives ("given") and that
        of another query ("shuffled"), if it gives some to every query, and in latent mode ("latent") and with the first
        hits of the direct search ("read") if the checkpoint has these modes; each with its standard error over the
        queries ("off_se"); "emission", the fraction of reasoning
        traces in which the model itself sampled the embed token; "tokens" and "median_tokens", their mean and median
        length; "distinct", the number of different traces divided by the number of queries; "uniformity" of the
        documents and "alignment" of direct queries with their documents (Wang and Isola 2020).
    """
    queries, relevance_QN = list(pool.queries.values()), _relevance(pool)
    direct_QD, documents_ND = _embed(encoder, pool, max_document_tokens)
    reasoned = encoder.reason(
        queries, max_reasoning_tokens=max_reasoning_tokens, batch_size=64, show_progress_bar=False
    )
    reasoning_QD = np.stack([r.embedding for r in reasoned])
    query, document = np.nonzero(relevance_QN)
    more: dict[str, float] = {}
    if encoder.latent_steps:
        latent_QD = encoder.encode_query(queries, reasoning="latent", show_progress_bar=False)
        more |= _quality("latent", latent_QD, documents_ND, relevance_QN)
    if encoder.reading is not None:
        texts = [document.full_text for document in pool.corpus.values()]
        hits_QK = top_k(direct_QD @ documents_ND.T, encoder.reading.passages)[1]
        passages = [[texts[n] for n in row] for row in hits_QK]
        read_QD = encoder.encode_query(queries, passages=passages, reasoning=False, show_progress_bar=False)
        more |= _quality("read", read_QD, documents_ND, relevance_QN)
    if len(pool.queries) > 1 and all(qid in pool.reasoning for qid in pool.queries):
        words = [pool.reasoning[qid] for qid in pool.queries]
        for name, given in (("given", words), ("shuffled", [*words[1:], words[0]])):
            given_QD = encoder.encode_query(queries, reasoning_text=given, show_progress_bar=False)
            more |= _quality(name, given_QD, documents_ND, relevance_QN)
    return {
        **more,
        **_quality("off", direct_QD, documents_ND, relevance_QN),
        **_quality("on", reasoning_QD, documents_ND, relevance_QN),
        "emission": float(np.mean([not r.forced for r in reasoned])),
        "tokens": float(np.mean([r.num_tokens for r in reasoned])),
        "median_tokens": float(np.median([r.num_tokens for r in reasoned])),
        "distinct": len({r.text for r in reasoned}) / len(reasoned),
        "uniformity": float(uniformity(torch.from_numpy(documents_ND))),
        "alignment": float(alignment(torch.from_numpy(direct_QD[query]), torch.from_numpy(documents_ND[document]))),
    }


def _quality(name: str, queries_QD: np.ndarray, documents_ND: np.ndarray, relevance_QN: np.ndarray) -> dict[str, float]:
    """The mean nDCG@10 as `name`, and its standard error over the queries (0 for one query)."""
    ndcg_Q = metrics.ndcg(queries_QD @ documents_ND.T, relevance_QN, 10)
    error = ndcg_Q.std(ddof=1) / np.sqrt(len(ndcg_Q)) if len(ndcg_Q) > 1 else 0.0
    return {name: float(ndcg_Q.mean()), f"{name}{ERROR}": float(error)}


def direct_ndcg(encoder: Any, pool: BeirDataset, max_document_tokens: int) -> float:
    """nDCG@10 of `encoder` on a dev pool without reasoning: "off" of `pool_metrics`, without the cost of the rest."""
    direct_QD, documents_ND = _embed(encoder, pool, max_document_tokens)
    return _quality("off", direct_QD, documents_ND, _relevance(pool))["off"]


def _embed(encoder: Any, pool: BeirDataset, max_document_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Direct embeddings of the queries, (Q, D), and of the documents, (N, D)."""
    documents_ND = encoder.encode_document(
        [document.full_text for document in pool.corpus.values()],
        max_length=max_document_tokens,
        show_progress_bar=False,
    )
    return encoder.encode_query(list(pool.queries.values()), reasoning=False, show_progress_bar=False), documents_ND


def _relevance(pool: BeirDataset) -> np.ndarray:
    """The relevance grades, (Q, N); 0 without a judgment."""
    columns = {did: i for i, did in enumerate(pool.corpus)}
    relevance_QN = np.zeros((len(pool.queries), len(columns)))
    for row, qid in enumerate(pool.queries):
        for did, grade in pool.qrels.get(qid, {}).items():
            if did in columns:
                relevance_QN[row, columns[did]] = grade
    return relevance_QN
