from __future__ import annotations

from pathlib import Path

import pytest

from danube_ray.quantize.gguf import convert
from tests.models import tiny_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), context_length=640)


@pytest.fixture(scope="session")
def gguf_file(model_folder, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "F32.gguf"
    convert(model_folder, file, "F32")
    return file
