from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import tiny_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A model whose rows no K type divides: hidden size 128, intermediate size 352."""
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def wide_model_folder(tmp_path_factory) -> Path:
    """A model of eight layers whose rows every type divides."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_layers": 8, "num_heads": 8, "num_kv_heads": 2}
    return tiny_model(tmp_path_factory.mktemp("wide_model"), **sizes)
