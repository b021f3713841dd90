"""The in-batch language-modeling regularizer: a query is predicted from the batch's documents, by their similarity.

ElicitR trains a language model along with the retriever: the next token of each text, given the batch's other texts
weighted by the retriever's similarities. Here the decoder itself is that language model, and a few queries of a batch
are predicted from a few of its documents, which bounds the cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from search_r3.prompts import Conversation, PromptTemplate
from search_r3.training.distributed import collectives
from search_r3.training.lora.policy import Encoded, Rows
from search_r3.training.sft.sft_config import SFTConfig

CONVERSATION = Conversation("Please write a query that the text answers.")
"""The prompt: the document, followed by the query. No embedding depends on it, so it is not in the contract."""
STREAM = 33
"""Seed offset, so that this term does not change the other random draws."""


@dataclass
class QueryDocumentPairs:
    """Which queries of a batch are predicted from which documents.

    Attributes:
        queries: pairs of the batch, Q of them.
        documents: for each, J documents of the batch, its own first.
    """

    queries: list[int]
    documents: list[list[int]]

    @property
    def rows(self) -> list[tuple[int, int]]:
        """(document, pair) of each row, a query's rows together."""
        return [(doc, pair) for pair, read in zip(self.queries, self.documents, strict=True) for doc in read]


def choose_query_documents(
    rng: np.random.Generator, pairs: int, documents: int, queries: int, per_query: int
) -> QueryDocumentPairs:
    """`queries` of `pairs` pairs, drawn by `rng`, each with its own document and others of the batch's `documents`.

    Document i is the own one of pair i. Fewer than `per_query` are taken where there are fewer.
    """
    chosen = sorted(rng.permutation(pairs)[:queries].tolist())
    read = []
    for pair in chosen:
        others = [document for document in rng.permutation(documents).tolist() if document != pair]
        read.append([pair, *others[: per_query - 1]])
    return QueryDocumentPairs(chosen, read)


def mean_log_probs(logits_TV: Tensor, target_T: Tensor, lengths: Sequence[int]) -> Tensor:
    """The mean log-probability of each row's tokens, (R,), float32 at least.

    Args:
        logits_TV: at the positions that predict the targets, row after row.
        target_T: the tokens.
        lengths: how many of them each row has, at least one.
    """
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    taken_T = logits_TV.to(wide).log_softmax(-1).gather(1, target_T[:, None])[:, 0]
    return torch.stack([part.mean() for part in taken_T.split(list(lengths))])


def in_batch_lm_loss(cosine_QJ: Tensor, log_prob_QJ: Tensor, temperature: float) -> Tensor:
    """Negative log-likelihood of each query under the similarity-weighted mixture of documents, in nats per token.

        mean_q  -log sum_j  w_q(j) p(q | d_j)^(1/|q|),   w_q = softmax_j(cos(q, d_j) / tau)

    Args:
        cosine_QJ: of each query with the documents that it is predicted from; the retriever learns to weigh documents
            by how well they predict the query.
        log_prob_QJ: the mean log-probability of the query's tokens after each document; the decoder learns to predict.
        temperature: tau > 0.

    Returns:
        Scalar >= 0, float32 (float64 for float64 inputs).

    Source: ElicitR's in-batch next-token regularizer, for a sample of queries.
    """
    with torch.autocast(device_type=cosine_QJ.device.type, enabled=False):
        wide = torch.promote_types(torch.promote_types(cosine_QJ.dtype, log_prob_QJ.dtype), torch.float32)
        log_weight_QJ = (cosine_QJ.to(wide) / temperature).log_softmax(1)
        return -(log_weight_QJ + log_prob_QJ.to(wide)).logsumexp(1).mean()


class InBatchLM:
    """The regularizer within a task: rows of a document followed by a query, and the loss over them.

    Args:
        config: the recipe.
        template: `CONVERSATION` as token ids.
        ids: texts and a limit -> their token ids.
    """

    def __init__(
        self, config: SFTConfig, template: PromptTemplate, ids: Callable[[list[str], int], list[list[int]]]
    ) -> None:
        self.config, self.template, self.ids = config, template, ids

    def choose(self, step: int, pairs: int, documents: int) -> QueryDocumentPairs:
        """The queries of a step and their documents: a function of the seed and the step."""
        rng = np.random.default_rng([self.config.loop.seed, step, STREAM])
        return choose_query_documents(
            rng, pairs, documents, self.config.in_batch_lm_queries, self.config.in_batch_lm_documents
        )

    def rows(self, query_documents: QueryDocumentPairs, queries: Sequence[str], documents: Sequence[str]) -> Rows:
        """This process's rows."""
        mine = [query_documents.rows[i] for i in collectives.strided_indices(len(query_documents.rows))]
        texts = self.ids([documents[document] for document, _ in mine], self.config.max_document_tokens)
        asked = self.ids([queries[pair] for _, pair in mine], self.config.max_query_tokens)
        rows = [[*text, *self.template.suffix, *query] for text, query in zip(texts, asked, strict=True)]
        return Rows(self.template.prefix, rows, [len(query) for query in asked])

    def loss(
        self,
        query_documents: QueryDocumentPairs,
        encoded: Encoded,
        lengths: Sequence[int],
        embedding: Mapping[str, Tensor],
    ) -> Tensor:
        """`in_batch_lm_loss` of the whole batch, the same on every process.

        Args:
            encoded: this process's rows, whose queries have `lengths` tokens.
            embedding: unit rows of the batch's "query" and "document".
        """
        log_prob_R = encoded.embedding_BD.new_zeros(0)
        if encoded.logits_TV is not None and encoded.target_T is not None:
            log_prob_R = mean_log_probs(encoded.logits_TV, encoded.target_T, lengths)
        (log_prob_R1,) = collectives.all_gather_rows([log_prob_R[:, None]], [len(query_documents.rows)])
        query_BD, document_MD = embedding["query"], embedding["document"]
        with torch.autocast(device_type=query_BD.device.type, enabled=False):
            cosine_BM = query_BD.float() @ document_MD.float().T
        read = zip(query_documents.queries, query_documents.documents, strict=True)
        cosine_QJ = torch.stack([cosine_BM[pair, documents] for pair, documents in read])
        return in_batch_lm_loss(cosine_QJ, log_prob_R1[:, 0].view_as(cosine_QJ), self.config.temperature)
