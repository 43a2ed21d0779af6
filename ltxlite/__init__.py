"""ltxlite: film-like clips with sound from LTX-2.3 on one small GPU."""

__version__ = "0.1.0"
