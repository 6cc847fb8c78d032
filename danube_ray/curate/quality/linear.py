"""A linear model over hashed word 1- and 2-grams: one look-up a word, one a pair of words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse

from danube_ray.curate.words import Words, ngram_hashes

# A text's n-grams weigh 1/M each, so that its length says nothing; this brings the features near 1 again, where the
# regression's penalty is of the usual size.
SCALE = 32.0
INVERSE_PENALTY = 10.0


def buckets(words: Words, num_buckets: int) -> np.ndarray:
    """(M,) int64, the bucket of each of a text's word 1- and 2-grams; `num_buckets` is a power of 2."""
    hashes = words.hashes
    grams = np.concatenate((hashes, ngram_hashes(hashes, 2)))
    return (grams & np.uint64(num_buckets - 1)).astype(np.int64)


@dataclass(frozen=True, eq=False)
class LinearModel:
    """weights: (buckets,) float32; the score is a log-odds."""

    weights: np.ndarray
    bias: float

    def score(self, of_text: np.ndarray) -> float:
        """Log-odds that a text is good, from its `buckets`."""
        if not len(of_text):
            return self.bias
        return self.bias + SCALE * float(self.weights.take(of_text).mean(dtype=np.float64))


def train(texts: list[np.ndarray], labels: np.ndarray, weights: np.ndarray, num_buckets: int, seed: int) -> LinearModel:
    """Logistic regression on the `buckets` of N texts; labels (N,) bool, weights (N,) float64."""
    from sklearn.linear_model import LogisticRegression

    # By dual coordinate descent: the time goes with the n-grams there are. L-BFGS takes 60 times as long, as each of
    # its steps goes over all buckets, for the same model.
    model = LogisticRegression(C=INVERSE_PENALTY, solver="liblinear", dual=True, max_iter=200, random_state=seed)
    model.fit(_matrix(texts, num_buckets), labels, sample_weight=weights)
    return LinearModel(np.ravel(model.coef_).astype(np.float32), np.ravel(model.intercept_).item())


def _matrix(texts: list[np.ndarray], num_buckets: int) -> scipy.sparse.csr_matrix:
    """(N, buckets): each text's share of n-grams in each bucket, scaled."""
    sizes = np.array([len(text) for text in texts])
    values = np.repeat(SCALE / np.maximum(sizes, 1), sizes)
    ends = np.concatenate(([0], np.cumsum(sizes)))
    matrix = scipy.sparse.csr_matrix((values, np.concatenate(texts), ends), shape=(len(texts), num_buckets))
    matrix.sum_duplicates()
    return matrix
