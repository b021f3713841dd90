"""Fitting a query projection: targets from judgements and a teacher, and a map that finds them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from search_r3.data.judged_queries import JudgedQuery
from search_r3.errors import InputError
from search_r3.training import linear_adapter
from search_r3.training.adapt import IndexedVectors
from search_r3.training.linear_adapter import Documents, LinearSettings, Target, fit_projection, targets

NAMES = {"a": 0, "b": 1, "c": 2, "d": 3}


def as_dict(target: Target) -> dict[int, float]:
    return dict(zip(target.columns.tolist(), target.weights.tolist(), strict=True))


class TestTargets:
    def test_judgements_weigh_by_their_grades(self) -> None:
        query = JudgedQuery("1", "q", {"b": 1.0, "c": 3.0})
        (target,) = targets(np.zeros((1, 4)), [query], NAMES, None, LinearSettings())
        assert as_dict(target) == {1: 0.25, 2: 0.75}

    def test_the_teacher_is_the_softmax_of_both_lists_scores(self) -> None:
        query = JudgedQuery("1", "q", {"a": 1.0})
        score_QM = np.array([[0.2, 0.8, 0.5, 0.2]])
        settings = LinearSettings(teacher=2.0, teacher_temperature=0.5)
        words = [{"b": 4.0, "d": 8.0, "gone": 9.0}]
        (target,) = targets(score_QM, [query], NAMES, words, settings)
        fused = np.array([0.0, 0.5 * 1 + 0.5 * 0, 0.25, 0.5])  # min-max of each list, halves
        share = np.exp(fused / 0.5) / np.exp(fused / 0.5).sum()
        expected = {column: 2 * value for column, value in enumerate(share)}
        expected[0] += 1.0
        assert as_dict(target) == pytest.approx(expected)

    def test_a_query_without_words_that_are_found_has_vectors_alone(self) -> None:
        query = JudgedQuery("1", "q", {"a": 1.0})
        (target,) = targets(np.array([[0.1, 0.9, 0.3, 0.2]]), [query], NAMES, [{}], LinearSettings())
        assert sum(as_dict(target).values()) == pytest.approx(2.0)
        assert as_dict(target)[1] > 0.9

    def test_no_weight_for_the_teacher_is_no_teacher(self) -> None:
        query = JudgedQuery("1", "q", {"a": 1.0})
        (target,) = targets(np.zeros((1, 4)), [query], NAMES, [{"b": 1.0}], LinearSettings(teacher=0.0))
        assert as_dict(target) == {0: 1.0}


class TestDocuments:
    def test_the_nearest_chunk_of_a_document_counts(self) -> None:
        rng = np.random.default_rng(0)
        index = IndexedVectors([f"d{i % 7}" for i in range(20)], rng.normal(size=(20, 8)))
        query_QD = rng.normal(size=(3, 8)).astype(np.float32)
        documents = Documents(index.vector_ND, index.starts, np.array([0]))
        found = documents.cosines(torch.from_numpy(query_QD)).numpy()
        np.testing.assert_allclose(found, index.scores(query_QD), atol=1e-6)

    def test_of_a_large_index_those_of_the_targets_and_some_others_are_compared(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(linear_adapter, "MOST_DOCUMENTS", 5)
        rng = np.random.default_rng(0)
        index = IndexedVectors([f"d{i:02}" for i in range(20)], rng.normal(size=(20, 8)))
        documents = Documents(index.vector_ND, index.starts, np.array([3, 17]))
        assert len(documents.place_of) == 5
        assert {3, 17} <= set(documents.place_of)
        query_QD = rng.normal(size=(2, 8)).astype(np.float32)
        found = documents.cosines(torch.from_numpy(query_QD)).numpy()
        chosen = sorted(documents.place_of)
        np.testing.assert_allclose(found, index.scores(query_QD)[:, chosen], atol=1e-6)


class TestFit:
    def test_it_learns_a_rotation_and_keeps_the_best_step(self) -> None:
        rng = np.random.default_rng(0)
        document_MD = rng.normal(size=(60, 12)).astype(np.float32)
        document_MD /= np.linalg.norm(document_MD, axis=1, keepdims=True)
        turned, _ = np.linalg.qr(rng.normal(size=(12, 12)))
        row_RD = (document_MD @ turned).astype(np.float32)
        names = [f"d{i:02}" for i in range(60)]
        index = IndexedVectors(names, document_MD)
        queries = [JudgedQuery(str(i), "q", {names[i]: 1.0}) for i in range(60)]
        train, held_out = queries[:45], queries[45:]
        target_of = targets(index.scores(row_RD[:45]), train, index.column_of, None, LinearSettings())

        def measure(projection: object) -> float:
            return float(index.measure(projection(row_RD[45:]), held_out)["ndcg@10"].mean())  # type: ignore[operator]

        documents = Documents(index.vector_ND, index.starts, np.arange(60))
        settings = LinearSettings(steps=120, batch_size=32, learning_rate=0.05, temperatures=(0.1, 0.05))
        fitted = fit_projection(row_RD[:45], target_of, documents, measure, settings)
        assert fitted.step > 0
        assert fitted.ndcg > 0.5
        assert measure(fitted.projection) == pytest.approx(fitted.ndcg)
        again = fit_projection(row_RD[:45], target_of, documents, measure, settings)
        assert np.array_equal(again.projection.weight_DD, fitted.projection.weight_DD)

    def test_what_is_not_better_leaves_queries_as_they_are(self) -> None:
        row_RD = np.eye(4, dtype=np.float32)
        index = IndexedVectors(list(NAMES), row_RD)
        queries = [JudgedQuery(name, name, {name: 1.0}) for name in NAMES]
        target_of = targets(index.scores(row_RD), queries, index.column_of, None, LinearSettings())
        documents = Documents(index.vector_ND, index.starts, np.arange(4))
        fitted = fit_projection(row_RD, target_of, documents, lambda projection: 1.0, LinearSettings(steps=6))
        assert fitted.step == 0
        assert not fitted.projection.weight_DD.any()

    @pytest.mark.parametrize(
        "wrong",
        [{"steps": 0}, {"learning_rate": 0.0}, {"temperatures": ()}, {"temperatures": (0.0,)}, {"teacher": -1.0}],
    )
    def test_settings_that_cannot_be_are_refused(self, wrong: dict[str, object]) -> None:
        with pytest.raises(InputError):
            LinearSettings(**wrong)  # type: ignore[arg-type]
