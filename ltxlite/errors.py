"""Everything ltxlite raises on purpose.

LtxliteError
├── RequestError      what was asked for cannot be done (sizes, flags, job files)
├── CheckpointError   a model file is missing, damaged, of another family or incomplete
├── ShapeError        tensors that do not fit together
├── BudgetError       too little VRAM, RAM or disk
└── MediaError        a picture, sound or video file cannot be read or written

`FormatError` (a malformed container or an unknown quantization format) comes from
`ltxlite_quant.formats`, which knows nothing of this package; `cli` reports it the same way.
A message says what, where, got, wanted and what to do, in one line.
"""


class LtxliteError(Exception):
    """Base of every error that is the user's to fix; the command line prints it as one line."""


class RequestError(LtxliteError):
    """The request itself is impossible or inconsistent."""


class CheckpointError(LtxliteError):
    """A model file is missing, damaged, of the wrong kind or incomplete."""


class ShapeError(LtxliteError):
    """Tensors do not fit together."""


class BudgetError(LtxliteError):
    """The work does not fit the memory or disk that is there."""


class MediaError(LtxliteError):
    """A media file cannot be read or written."""
