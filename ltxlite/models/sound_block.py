"""A transformer block without the picture's half: sound that follows its prompt alone.

Source: LTX-2 400fd31, LTXAudioOnlyModelConfigurator; features.md G4.
"""

from torch import nn

from ltxlite.models.block import PassState, StreamBlock
from ltxlite.models.passes import Skip
from ltxlite.models.transformer_config import TransformerConfig


class SoundBlock(nn.Module):
    """The sound's own part of a block, under the names that it has in a whole one."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.audio = StreamBlock(config.audio, config)

    def forward(self, state: PassState, number: int) -> None:
        """Advance the sound of a pass; `number` is the block's index."""
        stream = state.audio
        assert stream is not None  # a pass has a stream
        self.audio.enter(stream, number)
        if stream.enabled:
            self.audio.attend_self(
                stream, state.given.skipped(Skip.AUDIO_SELF, number), state.chunk
            )
            self.audio.attend_text(stream, state.chunk)
            self.audio.feed(stream, state.chunk)
        stream.block = None
