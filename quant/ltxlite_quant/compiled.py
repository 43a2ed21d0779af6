"""How functions are compiled, where numba is installed; elsewhere they stay as they are.

fp32 throughout, so that a group is one or two registers; a literal would make numba compute in
fp64, hence named constants.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np

try:
    import numba
except ImportError:
    HAVE_NUMBA = False
else:
    HAVE_NUMBA = True

Function = TypeVar("Function", bound=Callable[..., Any])
Floats = np.ndarray[Any, np.dtype[np.float32]]

ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)


def compiled(function: Function) -> Function:
    """Compile a function for fp32 arithmetic in any order; the decorator of a kernel."""
    # nogil: chunks run in threads.  cache: compiling takes seconds, once a machine.
    if not HAVE_NUMBA:
        return function
    return cast(Function, numba.njit(function, fastmath=True, nogil=True, cache=True))
