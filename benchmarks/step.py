"""One transformer step beside diffusers and ltx-core: time and activation memory.

The model is of the 2.3 kind, of middle size and random: what is compared is the code around equal
matrices. All contestants share the very same weight tensors, inputs and threads; every one of them
builds its rotary tables anew in each step.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Case, Contestant
from benchmarks.rivals import RIVALS, Rival, Run, Weights
from ltxlite.checkpoint.assemble import Naming
from ltxlite.geometry import AudioGrid, LatentGrid, audio_positions, video_positions
from ltxlite.models.passes import Pass, StreamInput, Timesteps
from ltxlite.models.settings import Settings
from ltxlite.models.transformer import FLOAT32, IGNORED, RENAMES, Transformer
from ltxlite.models.transformer_config import TransformerConfig
from ltxlite.release import EXPORTS, release_name

Shapes = dict[str, tuple[int, ...]]

DESCRIPTION = "one step of a random 2.3 transformer beside diffusers and ltx-core"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCES = {"fp32": 3e-4, "bf16": 3e-2}  # oracles.md 4: noise floors 1.1e-4 and 1.2e-2
CHANNELS = 128
PREFIX = EXPORTS["transformer"][0]
SIGMA = 0.725


@dataclass(frozen=True, slots=True)
class Size:
    """Extent of the model and of its inputs."""

    blocks: int = 8
    heads: int = 16
    video_head: int = 64
    audio_head: int = 32
    latent: tuple[int, int, int] = (16, 8, 16)
    audio_tokens: int = 126
    text_rows: int = 1024

    @property
    def widths(self) -> dict[str, int]:
        """Residual width of each stream."""
        return {"video": self.heads * self.video_head, "audio": self.heads * self.audio_head}

    @property
    def facts(self) -> dict[str, Any]:
        """What a reader must know to judge the numbers."""
        frames, rows, columns = self.latent
        return {
            "blocks": self.blocks,
            "heads": self.heads,
            "widths": list(self.widths.values()),
            "video_tokens": frames * rows * columns,
            "audio_tokens": self.audio_tokens,
            "text_rows": self.text_rows,
        }


SMALL = Size(2, 4, 16, 8, (3, 3, 7), 17, 40)


def settings_of(size: Size) -> dict[str, Any]:
    """Return the `transformer` section of a 2.3 checkpoint of this size (model.md 1.2)."""
    widths = size.widths
    return {
        "num_attention_heads": size.heads,
        "attention_head_dim": size.video_head,
        "num_layers": size.blocks,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "cross_attention_dim": widths["video"],
        "audio_num_attention_heads": size.heads,
        "audio_attention_head_dim": size.audio_head,
        "audio_in_channels": CHANNELS,
        "audio_out_channels": CHANNELS,
        "audio_cross_attention_dim": widths["audio"],
        "positional_embedding_theta": 10000.0,
        "positional_embedding_max_pos": [20, 2048, 2048],
        "audio_positional_embedding_max_pos": [20],
        "norm_eps": 1e-6,
        "norm_elementwise_affine": False,
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "qk_norm": "rms_norm",
        "standardization_norm": "rms_norm",
        "positional_embedding_type": "rope",
        "rope_type": "split",
        "frequencies_precision": "float64",
        "use_middle_indices_grid": True,
        "timestep_scale_multiplier": 1000,
        "av_ca_timestep_scale_multiplier": 1000.0,
        "av_cross_ada_norm": True,
        "use_audio_video_cross_attention": True,
        "apply_gated_attention": True,
        "cross_attention_adaln": True,
        "caption_proj_before_connector": True,
        "cross_attention_norm": True,
        "num_embeds_ada_norm": 1000,
        "num_vector_embeds": None,
        "dropout": 0.0,
        **dict.fromkeys(
            (
                "share_ff",
                "double_self_attention",
                "only_cross_attention",
                "upcast_attention",
                "use_linear_projection",
            ),
            False,
        ),
    }


def checkpoint_shapes(size: Size) -> Shapes:
    """Return the names and shapes of the transformer's tensors, as release files spell them."""
    with torch.device("meta"):
        model = Transformer(TransformerConfig.from_settings(Settings(settings_of(size), "step")))
    return {
        release_name("transformer", name).removeprefix(PREFIX): tuple(value.shape)
        for name, value in model.state_dict().items()
    }


def random_weights(size: Size, dtype: torch.dtype, seed: int = 0) -> Weights:
    """Draw weights that keep activations near one, so that an error is not drowned or blown up."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        values = torch.randn(shape, generator=generator)
        if name.endswith("_norm.weight"):
            values = 1 + 0.1 * values
        elif name.endswith(".weight"):
            values *= shape[1] ** -0.5
        else:
            values *= 0.1
        return values.to(dtype)

    return {name: draw(name, shape) for name, shape in checkpoint_shapes(size).items()}


def random_pass(size: Size, dtype: torch.dtype, seed: int = 1) -> Pass:
    """Draw the inputs of a text-to-video step: one noise level for all tokens, no masks."""
    generator = torch.Generator().manual_seed(seed)
    positions = {
        "video": video_positions(size.latent, 24.0, LatentGrid()),
        "audio": audio_positions(size.audio_tokens, AudioGrid()),
    }

    def stream(name: str) -> StreamInput:
        tokens = positions[name].shape[2]
        latent = torch.randn(1, tokens, CHANNELS, generator=generator)
        context = torch.randn(1, size.text_rows, size.widths[name], generator=generator)
        return StreamInput(
            latent=latent.to(dtype),
            sigma=torch.tensor([SIGMA]),
            timesteps=Timesteps(torch.tensor([SIGMA]), torch.zeros(1, 1, dtype=torch.long)),
            positions=positions[name],
            context=context.to(dtype),
        )

    return Pass(stream("video"), stream("audio"))


def build_ours(settings: dict[str, Any], weights: Weights, given: Pass) -> Run:
    """Build ltxlite's transformer from checkpoint names; tables in fp32, as files hold them."""
    with torch.device("meta"):
        model = Transformer(TransformerConfig.from_settings(Settings(settings, "benchmark")))
    naming = Naming(RENAMES, IGNORED, FLOAT32)
    renamed = {naming.rename(name): value for name, value in weights.items()}
    state = {
        name: value.float() if naming.keeps_float32(name) else value
        for name, value in renamed.items()
    }
    model.load_state_dict(state, strict=True, assign=True)
    model.eval()

    def run() -> dict[str, Tensor]:
        velocity = model(given)
        assert velocity.video is not None and velocity.audio is not None
        return {"video": velocity.video, "audio": velocity.audio}

    return run


def contestants(
    size: Size, dtype: torch.dtype, rivals: Sequence[Rival] = RIVALS
) -> Iterator[Contestant]:
    """Yield ltxlite, then every rival, on the same weights and inputs."""
    settings, weights = settings_of(size), random_weights(size, dtype)
    given = random_pass(size, dtype)
    yield Contestant("ltxlite", build_ours(settings, weights, given))
    for rival in rivals:
        missing = rival.missing()
        run = None if missing else rival.build(settings, weights, given)
        yield Contestant(rival.name, run, missing)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what only this benchmark can be told."""
    parser.add_argument(
        "--small", action="store_true", help="a toy size: tries the benchmark, measures nothing"
    )


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Yield fp32, then bf16."""
    size = SMALL if options.small else Size()
    for name, dtype in DTYPES.items():
        facts = {"dtype": name, **size.facts}
        build = partial(contestants, size, dtype)
        yield Case(name, facts, TOLERANCES[name], build)
