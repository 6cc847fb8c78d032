from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import tiny_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), context_length=1024)
