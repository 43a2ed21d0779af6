"""Contexts of prompts on disk: a prompt that was encoded once costs nothing the next time."""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ltxlite.errors import MediaError
from ltxlite.media.atomic import written_beside

_NAMES = ("video", "audio")
_KEPT_BYTES = 1 << 30  # 80 contexts of LTX-2.3 in bf16; the longest unused go first


class ContextCache:
    """A folder of contexts, one file a prompt, named by a hash of text and makers.

    A file that is damaged, or of another shape than it says, is as good as none.
    """

    def __init__(self, folder: Path, note: Callable[[str], None]) -> None:
        self.folder, self._note = folder, note

    def find(self, makers: str, text: str) -> tuple[Tensor, Tensor] | None:
        """Return the contexts (1, S, W) of picture and sound, or None.

        makers: everything but the text that a context depends on.
        """
        path = self._path(makers, text)
        try:
            tensors = load_file(path)
            path.touch()
        except (OSError, SafetensorError):
            return None
        pair = [tensors.get(name) for name in _NAMES]
        video, audio = pair
        if video is None or audio is None or {video.dim(), audio.dim()} != {3}:
            return None
        return video, audio

    def keep(self, makers: str, text: str, pair: tuple[Tensor, Tensor]) -> None:
        """Store contexts; where that is not possible, say so and go on."""
        tensors = {n: t.cpu().contiguous() for n, t in zip(_NAMES, pair, strict=True)}
        try:
            with written_beside(self._path(makers, text)) as partial:
                save_file(tensors, partial)
            self._make_room()
        except (OSError, SafetensorError, MediaError) as error:
            self._note(f"the prompt's context is not kept for later runs: {error}")

    def _path(self, makers: str, text: str) -> Path:
        digest = hashlib.sha256(f"{makers}\0{text}".encode("utf-8", "surrogatepass"))
        return self.folder / f"{digest.hexdigest()}.safetensors"

    def _make_room(self) -> None:
        files = sorted(self.folder.glob("*.safetensors"), key=lambda path: -path.stat().st_mtime)
        held = 0
        for path in files:
            held += path.stat().st_size
            if held > _KEPT_BYTES:
                with suppress(OSError):  # another run may have removed it
                    path.unlink()
