"""A configuration made from shapes, against the official one and through both our readers."""

import json
from pathlib import Path

import pytest
import release_files as made
from failure_files import MODEL, changed, networks
from release_forms import FULL

from ltxlite.convert.inferred import configuration, inferred_config
from ltxlite.models.connector import ConnectorConfig
from ltxlite.models.settings import Settings
from ltxlite.models.transformer_config import TransformerConfig

CONNECTOR = "_embeddings_connector."


def inferred(family: str, bare: bool = False) -> dict[str, object]:
    transformer = TransformerConfig.from_shapes(made.dit(family))
    if bare:
        return inferred_config(transformer)["transformer"]
    shapes = made.connectors(family)
    streams = [
        ConnectorConfig.from_shapes(
            {n.removeprefix(s + CONNECTOR): v for n, v in shapes.items() if n.startswith(s)}
        )
        for s in ("video", "audio")
    ]
    return inferred_config(transformer, *streams)["transformer"]


def test_2_3_without_config_gets_the_official_one_key_by_key() -> None:
    official = FULL["config"]["transformer"]
    # Files leave out the channels of sound, which the official code takes for 128.
    assert inferred("2.3") == official | {"audio_in_channels": 128}


def test_2_0_without_config_gets_the_keys_of_its_release_and_no_others() -> None:
    found = inferred("2.0")
    # model.md 1.2, column 2.0: what is absent there, and what differs.
    absent = {"apply_gated_attention", "cross_attention_adaln", "caption_proj_before_connector"}
    absent |= {"text_encoder_norm_type", "connector_apply_gated_attention"}
    assert not absent & found.keys()
    assert found["connector_num_attention_heads"] == 30
    assert found["connector_num_layers"] == 2
    assert found["caption_channels"] == 3840
    assert "audio_connector_num_attention_heads" not in found


@pytest.mark.parametrize("family", ["2.0", "2.3"])
def test_what_was_inferred_reads_back_as_the_same_hyper_parameters(family: str) -> None:
    text = json.dumps(inferred(family))
    settings = Settings(json.loads(text), "config")
    config = TransformerConfig.from_settings(settings)
    assert config == TransformerConfig.from_shapes(made.dit(family))
    assert config.unread == ()
    shapes = made.connectors(family)
    for stream in ("video", "audio"):
        wanted = ConnectorConfig.from_shapes(
            {n.removeprefix(stream + CONNECTOR): v for n, v in shapes.items() if stream in n}
        )
        found = ConnectorConfig.from_settings(Settings(json.loads(text), "x"), stream == "audio")
        assert found == wanted


def test_a_file_without_config_gets_one_that_says_all_that_was_told_by_shapes(
    tmp_path: Path,
) -> None:
    bare = changed(tmp_path / "bare-distilled.safetensors", metadata={})
    official, found = networks(MODEL), networks(bare)
    config, was_inferred = configuration(found, "transformer")
    assert was_inferred
    assert configuration(found, "video_decoder") == (None, False)
    sidecar = tmp_path / f"{bare.name}.config.json"
    sidecar.write_text(json.dumps(config), encoding="utf-8")
    described = networks(bare)
    assert configuration(described, "transformer") == (config, False)
    assert described.transformer_config() == official.transformer_config()
    for sound in (False, True):
        assert described.connector_config(sound) == official.connector_config(sound)
    assert configuration(official, "video_decoder")[0] is not None


def test_a_transformer_without_connectors_says_nothing_of_them() -> None:
    found = inferred("2.0", bare=True)
    assert not [name for name in found if name.startswith(("connector_num", "audio_connector"))]
