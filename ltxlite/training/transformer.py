"""Trains the transformer, the connectors and the text projection, on latents alone.

60 % of the noise levels are those that distilled sampling visits, so eight and three steps work
without distillation. Cases that the runtime offers are trained as well: a given first frame, given
sound, given picture, an empty prompt, several lengths, rates and sizes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ltxlite.geometry import AudioGrid, LatentGrid, audio_positions, video_positions
from ltxlite.models.passes import (
    APART,
    Pass,
    StreamInput,
    StreamRope,
    Timesteps,
    Velocity,
)
from ltxlite.models.settings import Settings
from ltxlite.models.transformer import Transformer
from ltxlite.models.transformer_config import TransformerConfig
from ltxlite.sampling.schedules import TABLES
from ltxlite.training import recipe
from ltxlite.training.latents import Kind, Latents, Scale, read_latents
from ltxlite.training.loop import CPU, Loop, Note, Pace
from ltxlite.training.text import CaptionRows, TextPath, sampled_contexts, text_path
from ltxlite.training.world import PHRASES, every_fact

PACE = Pace(steps=7000, rate=2e-3, warmup=200, decay=0.5, matrix_rate=0.02)
_FIRST = TABLES["distilled"][:-1]
_SECOND = TABLES["stage2"][:-1]
_TABLED = 0.6  # of the noise levels are a schedule's
# Of a run, with scenes of every place, size and speed. Few steps of sampling cannot choose among
# so much at once: they blend, and shapes melt. What is sampled later is narrow, and so is training.
_WIDE = 0.4
# From then on noise levels of a table count by what is decided there: above 0.97, where five of
# eight lie, hardly anything of a clip can be seen yet.
_FAINT, _DECISIVE = 1.0, 4.0
# Chances of what a step trains besides plain generation.
_EMPTY, _FIRST_FRAME, _GIVEN_PICTURE, _GIVEN_SOUND, _MUTE = 0.05, 0.2, 0.1, 0.25, 0.1
# First what is seen, with and without sound; that both pulse together is learned last. Attention
# between the two is left out till then: while neither stream says anything it is noise to the
# other, training closes it, and Muon moves what is closed until it never opens again (docs/log.md).
_MUTE_ALONE = 0.4
_TOGETHER = 0.5  # of the run, from where on they meet
_OTHER_PHRASE = 0.15
_TOKENS = 1900  # of a batch, both streams: 48 clips of 64x64x17


def build() -> tuple[Transformer, TextPath]:
    """Build transformer and text path with initial weights.

    Norms and prompt modulation start away from neutral, so that the model comes to depend on them
    and a test can tell when they are left out: 1 + scale, which channels of a prompt are multiplied
    by, is negative for half of them. Where all began around 1, leaving it out changed latents by
    6 % and no attribute.
    """
    transformer = Transformer(
        TransformerConfig.from_settings(Settings(recipe.TRANSFORMER, "recipe"))
    )
    path = text_path()
    generator = torch.Generator().manual_seed(recipe.SEED)
    with torch.no_grad():
        for network in (transformer, *path.networks().values()):
            for name, value in network.named_parameters():
                value.copy_(_initial(name, value, generator))
    return transformer, path


def _initial(name: str, value: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(value.shape, generator=generator)
    if name == "registers":
        return noise
    if name.endswith("norm.weight"):
        return 1 + 0.2 * noise
    if name.endswith("prompt_table"):
        shift, factor = noise
        return torch.stack((0.3 * shift, 0.7 * factor.sign() + 0.3 * factor - 1))
    if name.endswith("table"):
        return _table(name, 0.02 * noise)
    if "to_gate_logits" in name or "head." in name or value.ndim == 1:
        return torch.zeros_like(value)
    plain = noise / math.sqrt(value.shape[1])
    if name.endswith("prompt_adaln.linear.weight"):
        return 0.1 * plain
    return 0.02 * plain if name.endswith("adaln.linear.weight") else plain


def _table(name: str, rows: Tensor) -> Tensor:
    """Open the gates: 2, 5 and 8 of a block's table, 4 of a cross table."""
    gates = {5: (4,), 9: (2, 5, 8)}.get(len(rows), ())
    for row in gates:
        rows[row] += 0.5
    return rows


@dataclass(frozen=True, slots=True)
class Case:
    """What a batch trains: clips by index, their levels of noise, and what of them is given.

    mute: the picture alone, which has more to learn than the sound and costs half without it.
    """

    picks: Tensor
    sigma: Tensor
    first_frame: bool = False
    given_sound: bool = False
    given_picture: bool = False
    mute: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Normalised tokens of all clips of a kind and where they stand."""

    kind: Kind
    facts: Tensor
    video: Tensor
    audio: Tensor
    rope: tuple[StreamRope, StreamRope]
    positions: tuple[Tensor, Tensor]
    first: int  # tokens of the first latent frame

    @classmethod
    def of(cls, latents: Latents, scale: Scale, transformer: Transformer) -> "Table":
        """Prepare a kind of clips, on the transformer's device."""
        frames, rows, columns = latents.video.shape[2:]
        device = next(transformer.parameters()).device
        places = (
            video_positions((frames, rows, columns), latents.kind.fps, LatentGrid()).to(device),
            audio_positions(latents.audio.shape[2], AudioGrid()).to(device),
        )
        return cls(
            latents.kind,
            latents.facts,
            scale.video(latents.video).flatten(2).transpose(1, 2).contiguous().to(device),
            scale.audio(latents.audio).transpose(1, 2).flatten(2).contiguous().to(device),
            (transformer.rope(places[0], False), transformer.rope(places[1], True)),
            places,
            rows * columns,
        )

    @property
    def clips(self) -> int:
        """Clips of a batch."""
        return max(4, min(64, _TOKENS // (self.video.shape[1] + self.audio.shape[1])))


class TransformerTraining:
    """The loop's parts: networks, tables of latents, one step."""

    def __init__(self, folder: Path, pace: Pace = PACE, device: torch.device = CPU) -> None:
        self.transformer, self.path = build()
        networks: dict[str, nn.Module] = {"transformer": self.transformer, **self.path.networks()}
        self.loop = Loop("transformer", folder, networks, pace, device)
        self.lesson = Lesson(self.path, CaptionRows(self.path), self.loop.generator)
        self.alone = replace(self.lesson, mute=_MUTE_ALONE, together=False)
        latents = read_latents(folder)
        self.scale = Scale.of(next(iter(latents.values())))
        tables = [Table.of(item, self.scale, self.transformer) for item in latents.values()]
        self.wide = [table for table in tables if table.kind.spread == 1]
        self.narrow = [table for table in tables if table.kind.spread < 1]

    def run(self, note: Note) -> None:
        """Train to the end."""
        for step in self.loop.steps(note):
            self.loop.learn(self.losses(step), note)

    def losses(self, step: int) -> dict[str, Tensor]:
        """Compute the losses of a step's batch."""
        generator = self.loop.generator
        tables = self.wide if self.loop.pace.progress(step) < _WIDE else self.narrow
        areas = [item.kind.count * item.kind.height * item.kind.width for item in tables]
        shares = torch.tensor(areas).sqrt()
        table = tables[int(torch.multinomial(shares, 1, generator=generator))]
        picks = torch.randint(len(table.facts), (table.clips,), generator=generator)
        said = self._captions(table, picks)
        lesson = self.lesson if self.loop.pace.progress(step) >= _TOGETHER else self.alone
        return lesson_losses(self.transformer, lesson, table, picks, said)

    def _captions(self, table: Table, picks: Tensor) -> list[str]:
        generator = self.loop.generator
        chance = torch.rand(2, generator=generator).tolist()
        if chance[0] < _EMPTY:
            return [""] * len(picks)
        other = chance[1] < _OTHER_PHRASE
        pick = int(torch.randint(1, len(PHRASES), (1,), generator=generator))
        facts = every_fact()
        return [facts[n].caption(pick if other else 0) for n in table.facts[picks].tolist()]


@dataclass(frozen=True, slots=True)
class Lesson:
    """What turns captions into contexts while something learns, and its source of chance.

    mute: share of the batches without sound.  together: whether streams attend to each other; only
    then it says something that one of them is given.
    """

    path: TextPath
    rows: CaptionRows
    generator: torch.Generator
    mute: float = _MUTE
    together: bool = True

    def case(self, table: Table, picks: Tensor) -> Case:
        """Draw what a batch of these clips trains."""
        generator = self.generator
        chance = torch.rand(4, generator=generator).tolist()
        levels = _SECOND if table.kind.height >= 128 else _FIRST
        given = chance[2]
        mute = chance[3] < self.mute
        one_given = self.together and not mute
        return Case(
            picks,
            _levels(levels, len(picks), table.kind.spread < 1, generator).to(picks.device),
            first_frame=chance[1] < _FIRST_FRAME,
            given_sound=one_given and given < _GIVEN_SOUND,
            given_picture=one_given and given > 1 - _GIVEN_PICTURE,
            mute=mute,
        )


def lesson_losses(
    transformer: Transformer, lesson: Lesson, table: Table, picks: Tensor, captions: Sequence[str]
) -> dict[str, Tensor]:
    """Compute the losses of some clips of a table and what is said of them."""
    device, generator = table.video.device, lesson.generator
    case = lesson.case(table, picks.to(device))
    rows = lesson.rows.of(captions)
    contexts = sampled_contexts(lesson.path, (rows[0].to(device), rows[1].to(device)), generator)
    video, audio, bias = contexts
    clean = (table.video[case.picks], table.audio[case.picks])
    noise = [torch.randn(x.shape, generator=generator).to(device) for x in clean]
    picture = _stream(table, case, clean[0], noise[0], video, sound=False)
    sound = _stream(table, case, clean[1], noise[1], audio, sound=True)
    apart = () if lesson.together else (APART,) * len(picks)
    made = velocities(transformer, Pass(picture, None if case.mute else sound, apart), bias)
    return _compared(table, case, made, [n - x for n, x in zip(noise, clean, strict=True)])


def _levels(
    table: tuple[float, ...], count: int, decisive: bool, generator: torch.Generator
) -> Tensor:
    levels = torch.tensor(table)
    weights = torch.where(levels < 0.95, _DECISIVE, _FAINT) if decisive else torch.ones(len(levels))
    listed = levels[torch.multinomial(weights, count, replacement=True, generator=generator)]
    free = torch.sigmoid(0.8 + 1.2 * torch.randn(count, generator=generator))
    return torch.where(torch.rand(count, generator=generator) < _TABLED, listed, free)


def _stream(
    table: Table, case: Case, clean: Tensor, noise: Tensor, context: Tensor, sound: bool
) -> StreamInput:
    """Mix noise into clean tokens (B, T, C), but for those that are given."""
    given = case.given_sound if sound else case.given_picture
    sigma = torch.zeros_like(case.sigma) if given else case.sigma
    batch, tokens = clean.shape[:2]
    index = torch.arange(1, batch + 1, device=sigma.device)[:, None]
    if case.first_frame and not sound:
        index = index.repeat(1, tokens)
        index[:, : table.first] = 0
    steps = Timesteps(torch.cat([sigma.new_zeros(1), sigma]), index)
    return StreamInput(
        latent=torch.lerp(clean, noise, steps.per_token()),
        sigma=sigma,
        timesteps=steps,
        positions=table.positions[sound],
        context=context,
        rope=table.rope[sound],
    )


def velocities(transformer: Transformer, given: Pass, bias: Tensor | None = None) -> Velocity:
    """Predict velocities where rows of the context count `bias` (1, 1, 1, S) more."""
    state = transformer.begin(given)
    for stream in (state.video, state.audio):
        if stream is not None and bias is not None:
            stream.context_bias = bias
    for number, block in enumerate(transformer.blocks):
        block(state, number)
    return transformer.finish(state)


def _compared(table: Table, case: Case, made: Velocity, wanted: list[Tensor]) -> dict[str, Tensor]:
    """Compare velocities where they were to be found."""
    found: dict[str, Tensor] = {}
    if made.video is not None and not case.given_picture:
        first = table.first if case.first_frame else 0
        found["video"] = (made.video - wanted[0])[:, first:].square().mean()
    if made.audio is not None and not case.given_sound:
        found["audio"] = (made.audio - wanted[1]).square().mean()
    return found
