"""The losses against their definitions on small cases."""

from __future__ import annotations

import torch

from danube_ray.train.losses import document_ids, sequence_log_probability, trained_labels


def test_labels_are_the_next_token_where_it_is_trained():
    tokens = torch.tensor([[5, 6, 7, 8]])
    trained = torch.tensor([[True, False, True, True]])
    assert trained_labels(tokens, trained).tolist() == [[-100, 7, 8]]


def test_a_rows_log_probability_is_the_product_of_its_trained_tokens():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[1, -100, 4], [-100, -100, -100]])
    p = logits.softmax(-1)
    found = sequence_log_probability(logits, labels)
    torch.testing.assert_close(found, torch.stack([(p[0, 0, 1] * p[0, 2, 4]).log(), torch.zeros(())]))
    assert sequence_log_probability(logits.to(torch.bfloat16), labels).dtype == torch.float32


def test_a_document_begins_at_its_first_token():
    tokens = torch.tensor([[9, 1, 7, 7, 1, 1], [1, 7, 7, 7, 7, 7]])
    assert document_ids(tokens, bos_id=1).tolist() == [[0, 1, 1, 1, 2, 3], [1] * 6]
