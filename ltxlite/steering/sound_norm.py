"""The sound made quieter between steps: tames what would be too loud or distorted.

After a step the predicted sound is multiplied by a factor, and the stage begins anew from there:
its own noise is mixed in again, as loud as the next step wants it.
Source: KJNodes LTX2AudioLatentNormalizingSampling, LTXVNormalizingSampler; features.md G8.
"""

from collections.abc import Sequence
from dataclasses import replace

from ltxlite.conditioning import States
from ltxlite.sampling.contract import Carry, Prediction, State, Step, Tools


class SoundNorm:
    """Multiplies the predicted sound after each step by that step's factor.

    factors: the last one serves all further steps; at 1 a step ends as ever.  states: picture and
    sound of the stage.  noises: what it began from.
    Only for samplers that evaluate once a step and carry nothing but the noisy state.
    """

    def __init__(self, factors: Sequence[float], states: States, noises: State) -> None:
        self._factors, self._states, self._noises = factors, states, noises
        self._predicted: State = ()

    def within(self, tools: Tools) -> Tools:
        """Return tools that do so."""

        def denoise(state: State, sigma: float) -> Prediction:
            prediction = tools.denoise(state, sigma)
            self._predicted = prediction.x0
            return prediction

        return replace(tools, denoise=denoise, after_step=self._after_step)

    def _after_step(self, carry: Carry, step: Step) -> Carry:
        factor = self._factors[min(step.index, len(self._factors) - 1)]
        if factor == 1:
            return carry
        (video, audio), (shown, heard) = self._states, self._predicted
        heard = heard * (1 + (factor - 1) * audio.mask)  # kept sound stays as it is
        begun = (replace(video, initial=shown), replace(audio, initial=heard))
        pairs = zip(begun, self._noises, strict=True)
        return {"x": tuple(state.noised(noise, step.following) for state, noise in pairs)}
