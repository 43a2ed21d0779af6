"""Models, and what was converted of them, that the tests of conversion read and never change."""

import json
import re
from pathlib import Path

import gguf
import pytest
import torch
from convert_support import MODEL, PREFIX, converted, metadata_of, source_tensors
from flavour_files import normal
from safetensors.torch import save_file

from ltxlite.demo import CONFIG
from ltxlite.models.connector import Connector, ConnectorConfig
from ltxlite.models.settings import Settings
from ltxlite.models.transformer import Transformer
from ltxlite.models.transformer_config import TransformerConfig
from ltxlite.release import release_name


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks of the tiny transformer and one layer of its connectors."""
    metadata = metadata_of(MODEL)
    config = json.loads(metadata["config"])
    config["transformer"] |= {"num_layers": 2, "connector_num_layers": 1}
    dropped = re.compile(r"transformer_blocks\.[23]\.|transformer_1d_blocks\.1\.")
    tensors = {PREFIX + n: t for n, t in source_tensors().items() if not dropped.search(n)}
    path = tmp_path_factory.mktemp("small") / "small-2.3-distilled.safetensors"
    save_file(tensors, path, metadata | {"config": json.dumps(config)})
    return path


@pytest.fixture(scope="session")
def small_written(small: Path) -> Path:
    """The same in Q8_0, beside it."""
    target = small.with_name("small-distilled-Q8_0.gguf")
    converted(target, small)
    return target


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny transformer in Q8_0."""
    target = tmp_path_factory.mktemp("gguf") / "tiny-distilled-Q8_0.gguf"
    converted(target)
    return target


@pytest.fixture(scope="session")
def reader(written: Path) -> gguf.GGUFReader:
    """The same, as ComfyUI-GGUF sees it."""
    return gguf.GGUFReader(written)


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer whose rows are whole blocks of 256, one block and one connector layer."""
    width = {"attention_head_dim": 128, "cross_attention_dim": 256}
    shared = CONFIG["transformer"] | {"num_layers": 1, "connector_num_learnable_registers": 3}
    settings = shared | width | {f"audio_{name}": size for name, size in width.items()}
    heads = ("connector_attention_head_dim", "audio_connector_attention_head_dim")
    settings |= dict.fromkeys(heads, 128)
    read = Settings(settings, "wide")
    with torch.device("meta"):
        networks: dict[str, torch.nn.Module] = {
            "transformer": Transformer(TransformerConfig.from_settings(read)),
            "video_connector": Connector(ConnectorConfig.from_settings(read)),
            "audio_connector": Connector(ConnectorConfig.from_settings(read, sound=True)),
        }
    tensors = {
        release_name(part, name): normal(*value.shape).bfloat16()
        for part, network in networks.items()
        for name, value in network.state_dict().items()
    }
    path = tmp_path_factory.mktemp("wide") / "wide-dev.safetensors"
    save_file(tensors, path, {"config": json.dumps({"transformer": settings})})
    return path
