"""Binds the transformer to one stage: latent states, prompts and guidance become a denoiser.

Source: LTX-2 400fd31 (ltx_pipelines denoising loops, ltx_core guiders); restated in model.md 4.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ltxlite.checkpoint.assemble import nonfinite_parameters
from ltxlite.conditioning import LatentState, attention_weights
from ltxlite.errors import CheckpointError, RequestError
from ltxlite.models.passes import (
    Avoided,
    ContextBias,
    Pass,
    Perturbation,
    Skip,
    StreamInput,
    StreamRope,
    Timesteps,
    Velocity,
)
from ltxlite.models.transformer import Transformer
from ltxlite.sampling.contract import Prediction, State
from ltxlite.sampling.guidance import combine
from ltxlite.sampling.settings import Guidance


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as one stream sees it: contexts (1, S, W), positive and, for guidance, negative.

    bias: what of the positive one each token sees.  avoided: what it leads away from. Neither is
    there where the negative one is seen.  Source: features.md C7, H1.
    """

    positive: Tensor
    negative: Tensor | None = None
    bias: ContextBias | None = None
    avoided: Avoided | None = None


@dataclass(frozen=True, slots=True)
class Stream:
    """One stream of a stage: its state, its prompt, how it is guided."""

    state: LatentState
    prompt: Prompt
    guidance: Guidance


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What one call of the denoiser saw and said, before clean tokens were put back."""

    sigma: float
    state: State
    x0: State


class Denoiser:
    """Predicts clean latents for the samplers; one object serves the steps of one stage.

    Streams are video, audio, or one of them. All passes of an evaluation run block by block, so
    that a streamed block crosses the bus once. `step` counts finished steps; guidance that
    depends on the step reads it. What else goes from step to step is in `predictions`.
    """

    def __init__(
        self,
        transformer: Transformer,
        video: Stream | None,
        audio: Stream | None,
        observe: Callable[[Evaluation], None] | None = None,
        needs_uncond: bool = False,
    ) -> None:
        self.transformer = transformer
        self.step = 0
        self._observe = observe
        self._needs_uncond = needs_uncond
        given = ((video, False), (audio, True))
        self._streams = [_Prepared(transformer, s, sound) for s, sound in given if s is not None]
        for item in self._streams:
            item.refuse_missing_negative(needs_uncond)

    def __call__(self, state: State, sigma: float) -> Prediction:
        """Predict x0 of every stream at noise level sigma; fp32."""
        active = [not item.stream.guidance.skips(self.step) for item in self._streams]
        if any(active):
            self._evaluate(state, sigma, active)
        guided = tuple(item.guided for item in self._streams)
        if self._observe is not None:
            self._observe(Evaluation(sigma, state, guided))
        uncond = None
        if self._needs_uncond:
            uncond = self.blend(tuple(item.uncond for item in self._streams))
        return Prediction(self.blend(guided), uncond)

    def predictions(self) -> dict[str, Tensor]:
        """Return the predictions that later steps reuse; none where no stream skips steps."""
        return {
            f"{name}.{number}": item.guided if name == "guided" else item.uncond
            for number, item in enumerate(self._streams)
            for name in reused_names(item.stream.guidance, self._needs_uncond)
        }

    def restore(self, step: int, predictions: Mapping[str, Tensor]) -> None:
        """Go on after `step` finished steps of a run that had these predictions."""
        self.step = step
        for number, item in enumerate(self._streams):
            item.guided = predictions.get(f"guided.{number}", item.guided)
            item.uncond = predictions.get(f"uncond.{number}", item.uncond)

    def blend(self, state: State) -> State:
        """Put the clean tokens back where the masks keep them."""
        pairs = zip(self._streams, state, strict=True)
        return tuple(item.stream.state.blend(x) for item, x in pairs)

    def _evaluate(self, state: State, sigma: float, active: list[bool]) -> None:
        names = self._passes()
        # Passes over the same inputs share these very records, and with them their first blocks.
        inputs = {name == "uncond": self._inputs(state, sigma, active, name) for name in names}
        velocities = self.transformer.run(
            [self._pass(name, inputs[name == "uncond"], len(state[0])) for name in names]
        )
        for position, item in enumerate(self._streams):
            if not active[position]:
                continue
            x0 = {
                name: item.x0(state[position], velocity, sigma)
                for name, velocity in zip(names, velocities, strict=True)
            }
            item.take(x0, self.step)

    def _passes(self) -> list[str]:
        needed: set[str] = {"cond"}
        for item in self._streams:
            needed |= item.stream.guidance.passes(self.step)
        if self._needs_uncond:
            needed.add("uncond")
        return [name for name in ("cond", "uncond", "perturbed", "isolated") if name in needed]

    def _inputs(
        self, state: State, sigma: float, active: list[bool], name: str
    ) -> dict[bool, StreamInput]:
        return {
            item.sound: replace(item.input(x, sigma, negative=name == "uncond"), enabled=enabled)
            for item, x, enabled in zip(self._streams, state, active, strict=True)
        }

    def _pass(self, name: str, inputs: Mapping[bool, StreamInput], batch: int) -> Pass:
        perturbations = (self._perturbation(name),) * batch
        return Pass(inputs.get(False), inputs.get(True), perturbations)

    def _perturbation(self, name: str) -> Perturbation:
        if name == "isolated":
            return Perturbation(((Skip.AUDIO_TO_VIDEO, None), (Skip.VIDEO_TO_AUDIO, None)))
        if name != "perturbed":
            return Perturbation()
        return Perturbation(
            tuple(
                (
                    Skip.AUDIO_SELF if item.sound else Skip.VIDEO_SELF,
                    frozenset(item.stream.guidance.stg_blocks),
                )
                for item in self._streams
                if item.stream.guidance.stg != 0
            )
        )


class _Prepared:
    """A stream with everything that does not change over the steps, and its last prediction."""

    def __init__(self, transformer: Transformer, stream: Stream, sound: bool) -> None:
        self.stream, self.sound = stream, sound
        self.guided = self.uncond = stream.state.clean  # until the first step predicts them
        self.levels: Timesteps = stream.state.levels()
        self.weights = attention_weights(stream.state)
        self.rope: StreamRope = transformer.rope(stream.state.positions, sound)

    def refuse_missing_negative(self, sampler_needs_it: bool) -> None:
        needs = sampler_needs_it or "uncond" in self.stream.guidance.passes(0)
        if needs and self.stream.prompt.negative is None:
            raise RequestError(
                "guidance needs a negative prompt, even an empty one; none was given"
            )

    def input(self, x: Tensor, sigma: float, negative: bool) -> StreamInput:
        state, prompt = self.stream.state, self.stream.prompt
        # A given stream keeps its prompt in the negative pass: nothing of it is being guided.
        context, bias, avoided = prompt.positive, prompt.bias, prompt.avoided
        if negative and prompt.negative is not None and not state.frozen:
            context, bias, avoided = prompt.negative, None, None
        level = 0.0 if state.frozen else sigma
        return StreamInput(
            latent=x,
            sigma=torch.full((x.shape[0],), level, device=x.device),
            timesteps=Timesteps(self.levels.values * sigma, self.levels.index),
            positions=state.positions,
            context=context,
            weights=self.weights,
            rope=self.rope,
            context_bias=bias,
            avoided=avoided,
        )

    def x0(self, x: Tensor, velocity: Velocity, sigma: float) -> Tensor:
        predicted = velocity.audio if self.sound else velocity.video
        assert predicted is not None
        per_token = Timesteps(self.levels.values * sigma, self.levels.index).per_token()
        return x - predicted * per_token

    def take(self, x0: dict[str, Tensor], step: int) -> None:
        self.guided = combine(
            x0["cond"],
            x0.get("uncond"),
            x0.get("perturbed"),
            x0.get("isolated"),
            self.stream.guidance,
            step,
        )
        self.uncond = x0.get("uncond", x0["cond"])


def reused_names(guidance: Guidance, needs_uncond: bool) -> tuple[str, ...]:
    """Name the predictions of a stream that its skipped steps repeat; none if it skips none."""
    if not guidance.skip_step:
        return ()
    return ("guided", "uncond") if needs_uncond else ("guided",)


def refuse_nonfinite(evaluation: Evaluation, transformer: Transformer) -> None:
    """Raise CheckpointError if a prediction holds NaN or infinity, naming damaged weights.

    Otherwise such weights, or overflowing fp16, show as a black clip minutes later.
    """
    if all(bool(x0.isfinite().all()) for x0 in evaluation.x0):
        return
    damaged = nonfinite_parameters(transformer)
    cause = (
        f"{len(damaged)} weights are damaged ({', '.join(damaged[:3])}): download the file again"
        if damaged
        else "its arithmetic overflows: use --dtype bfloat16 or float32"
    )
    raise CheckpointError(
        f"the transformer's prediction at sigma {evaluation.sigma:.4f} holds NaN; {cause}"
    )
