"""Puts everything that is given into the states of a stage, in one fixed order.

The source comes first, since all else replaces parts of it; images before what is appended, since
appended tokens come after the clip's own; sound last, it touches the other stream only, and a
voice is appended to it.
"""

from ltxlite.conditioning import StageContext, States
from ltxlite.conditions import Conditions
from ltxlite.given import StageGiven
from ltxlite.steering.images import steer_guides, steer_images, steer_references
from ltxlite.steering.sound import steer_sound
from ltxlite.steering.source import steer_source
from ltxlite.steering.voice import steer_voice

HOOKS = (steer_source, steer_images, steer_guides, steer_references, steer_sound, steer_voice)


def steer(states: States, conditions: Conditions, given: StageGiven, stage: StageContext) -> States:
    """Return the states (picture, sound) of a stage with all that it is given.

    The first `target` tokens of each stay the clip's own; what is appended comes after them.
    """
    for hook in HOOKS:
        states = hook(states, conditions, given, stage)
    return states
