"""Teaches a finished world model a colour that it has no word for, by a LoRA.

The smallest whole use of LoRA training: a base that stays, low-rank sums on some of its linears,
clips of the new word among clips of known ones, a file that every runtime loads.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ltxlite.demo import world_files
from ltxlite.errors import RequestError
from ltxlite.linear import QuantMatrix
from ltxlite.models.transformer import Transformer
from ltxlite.networks import Networks
from ltxlite.opening import open_networks
from ltxlite.release import release_name
from ltxlite.request import Files
from ltxlite.training import recipe
from ltxlite.training.export import save
from ltxlite.training.latents import NARROW, Kind, Latents, Scale
from ltxlite.training.loop import CPU, Loop, Note, Pace
from ltxlite.training.scene import draw, pictures, spectrograms
from ltxlite.training.text import CaptionRows, TextPath
from ltxlite.training.transformer import Lesson, Table, build, lesson_losses
from ltxlite.training.world import SPARE, Rgb, shown

PACE = Pace(steps=300, rate=4e-3, warmup=20, decay=0.5)
RANK = 4
TARGETS = re.compile(r"transformer_blocks\.\d+\.attn[12]\.to_(q|k|v|out\.0)")  # of the picture
_KIND = Kind(64, 64, 17, 16.0, 256, NARROW)
_PART = 16
_CLIPS = 24  # of a batch
_KNOWN = 0.5  # of the batches show colours that have a word: what they mean is to stay


class Sum(nn.Module):
    """B A beside a weight (N, K): a (r, K) random, b (N, r) zero, so that it begins as nothing."""

    def __init__(self, shape: tuple[int, int], rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, shape[1], generator=generator) / shape[1] ** 0.5)
        self.b = nn.Parameter(torch.zeros(shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the sum of both."""
        return weight + self.b @ self.a


class WordTraining:
    """The loop's parts: a base without gradients, what is added to it, one step.

    word: one of those that the tokenizer has to spare.  colour: what it is to mean, in [0, 1].
    Raises RequestError for another word.
    """

    def __init__(
        self,
        folder: Path,
        word: str,
        colour: Rgb,
        world: Path | None = None,
        pace: Pace = PACE,
        device: torch.device = CPU,
    ) -> None:
        if word not in SPARE:
            raise RequestError(f"{word!r} is no spare word; choose {' or '.join(SPARE)}")
        files = Files(str(world_files(world).model.parent))
        networks = open_networks(files, str(device), "float32")
        self.transformer, path = _plain(networks)
        self.sums = dict(_added(self.transformer))
        for network in (self.transformer, *path.networks().values()):
            network.to(device)
        keyed = {name.replace(".", "/"): module for name, module in self.sums.items()}
        self.loop = Loop(f"word-{word}", folder, keyed, pace, device)
        self.lesson = Lesson(path, CaptionRows(path), self.loop.generator)
        self.known = _clips(networks, self.transformer, None)
        self.new = _clips(networks, self.transformer, (word, colour))

    def run(self, note: Note) -> Path:
        """Train to the end and write the LoRA; returns its path."""
        for step in self.loop.steps(note):
            self.loop.learn(self.losses(step), note)
        path = self.loop.folder / f"{self.loop.name}.safetensors"
        save(path, dict(self._tensors()), {"base_model": "ltxlite-world-2.3", "rank": str(RANK)})
        return path

    def losses(self, step: int) -> dict[str, Tensor]:
        """Compute the losses of a step's batch."""
        draw_known = float(torch.rand((), generator=self.loop.generator)) < _KNOWN
        table, captions = self.known if draw_known else self.new
        picks = torch.randint(len(captions), (_CLIPS,), generator=self.loop.generator)
        said = [captions[pick] for pick in picks.tolist()]
        return lesson_losses(self.transformer, self.lesson, table, picks, said)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, module in self.sums.items():
            stem = release_name("transformer", name).removeprefix("model.")
            yield f"{stem}.lora_A.weight", module.a.detach().cpu().contiguous()
            yield f"{stem}.lora_B.weight", module.b.detach().cpu().contiguous()


def _plain(networks: Networks) -> tuple[Transformer, TextPath]:
    """Return the model with plain weights in fp32, whatever they are stored as."""
    transformer, path = build()
    pairs: tuple[tuple[nn.Module, nn.Module], ...] = (
        (transformer, networks.transformer()),
        (path.projection, networks.text_projection()),
        (path.video, networks.video_connector()),
        (path.audio, networks.audio_connector()),
    )
    for target, source in pairs:
        target.load_state_dict(dict(_decoded(source)))
        target.requires_grad_(False)
    return transformer, path


def _decoded(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    stored = {n: m for n, m in network.named_modules() if isinstance(m, QuantMatrix)}
    for name, value in network.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if owner not in stored or leaf == "bias":
            yield name, value.float()
    for name, module in stored.items():
        yield f"{name}.weight", module.decoded(torch.float32)


def _added(transformer: Transformer) -> Iterator[tuple[str, Sum]]:
    """Put a sum on every target; yields it by its module's name."""
    generator = torch.Generator().manual_seed(recipe.SEED)
    for name, module in list(transformer.named_modules()):
        full = release_name("transformer", name)
        if isinstance(module, nn.Linear) and TARGETS.search(full) and "audio" not in full:
            addition = Sum((module.out_features, module.in_features), RANK, generator)
            parametrize.register_parametrization(module, "weight", addition)
            yield name, addition


@torch.no_grad()
def _clips(
    networks: Networks, transformer: Transformer, new: tuple[str, Rgb] | None
) -> tuple[Table, list[str]]:
    """Encode clips of known colours, or of a new one; returns their table and captions."""
    generator = torch.Generator().manual_seed(recipe.SEED + (new is None))
    every = shown()
    picks = torch.randint(len(every), (_KIND.count,), generator=generator).tolist()
    facts = [every[pick] for pick in picks]
    encoders = networks.video_encoder(), networks.audio_encoder()
    parts = []
    for begin in range(0, len(facts), _PART):
        scenes = draw(facts[begin : begin + _PART], generator, NARROW)
        if new is not None:
            scenes = replace(scenes, colour=torch.tensor(new[1]).expand(len(scenes), 3))
        scenes = scenes.to(networks.device)
        pixels = pictures(scenes, (_KIND.height, _KIND.width), _KIND.frames, _KIND.fps)
        sounds = spectrograms(scenes, 4 * _KIND.sound - 3)
        parts.append((encoders[0](pixels).cpu(), encoders[1](sounds).cpu()))
    video, audio = (torch.cat([part[n] for part in parts]) for n in (0, 1))
    latents = Latents(_KIND, torch.tensor(picks), video, audio)
    said = [replace(item, colour=new[0]) if new else item for item in facts]
    return Table.of(latents, _normalised(video, audio), transformer), [f.caption() for f in said]


def _normalised(video: Tensor, audio: Tensor) -> Scale:
    """Return the scale of latents that are normalised already."""
    sound = audio.shape[1] * audio.shape[3]
    return Scale(
        torch.zeros(video.shape[1]), torch.ones(video.shape[1]),
        torch.zeros(sound), torch.ones(sound),
    )  # fmt: skip
