"""Binds the transformer to one stage: latent states, prompts and guidance become a denoiser.

Source: LTX-2 400fd31 (ltx_pipelines denoising loops, ltx_core guiders); restated in model.md 4.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ltxlite.checkpoint.assemble import nonfinite_parameters
from ltxlite.conditioning import LatentState, attention_weights, without_appended
from ltxlite.errors import CheckpointError, RequestError
from ltxlite.models.passes import (
    APART,
    UNSCALED,
    Avoided,
    BranchScales,
    ContextBias,
    Moments,
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
from ltxlite.sampling.identity import Identity
from ltxlite.sampling.settings import Guidance
from ltxlite.sampling.statistics import ChannelControl

PASSES = ("cond", "uncond", "perturbed", "isolated", "unvoiced")


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
    """One stream of a stage: its state, its prompt, how it is guided.

    control: what becomes of its guided prediction before clean tokens are put back.
    identity: of the sound with a voice appended: both streams are led away from one more pass,
    without that voice.
    moments: of its tokens, for linears that change over the clip.  scales: of what is added to it.
    """

    state: LatentState
    prompt: Prompt
    guidance: Guidance
    control: ChannelControl | None = None
    identity: Identity | None = None
    moments: Moments | None = None
    scales: BranchScales = UNSCALED


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What one call of the denoiser saw and said, before clean tokens were put back."""

    sigma: float
    state: State
    x0: State


class Denoiser:
    """Predicts clean latents for the samplers; one object serves the steps of one stage.

    Streams are video, audio, or one of them; one without tokens takes no part. All passes of an
    evaluation run block by block, so that a streamed block crosses the bus once. `step` counts
    finished steps; guidance that depends on the step reads it. What else goes from step to step
    is in `predictions`.
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
        self._unvoiced: _Prepared | None = None
        if audio is not None and audio.identity is not None:
            self._unvoiced = _Prepared(transformer, _without_voice(audio), sound=True)

    def __call__(self, state: State, sigma: float) -> Prediction:
        """Predict x0 of every stream at noise level sigma; fp32."""
        active = [item.present and not item.skips(self.step) for item in self._streams]
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

    def hold(self, state: State) -> State:
        """Do the same to noisy states, unless their masks are mixed in before each call."""
        pairs = zip(self._streams, state, strict=True)
        states = ((item.stream.state, x) for item, x in pairs)
        return tuple(x if state.mixed else state.blend(x) for state, x in states)

    def _evaluate(self, state: State, sigma: float, active: list[bool]) -> None:
        names = self._passes(sigma)
        # Passes over the same inputs share these very records, and with them their first blocks.
        inputs = {kind: self._inputs(state, sigma, active, kind) for kind in map(_inputs_of, names)}
        velocities = self.transformer.run(
            [self._pass(name, inputs[_inputs_of(name)], len(state[0])) for name in names]
        )
        for position, item in enumerate(self._streams):
            if not active[position]:
                continue
            x0 = {
                name: self._heard(item, name).x0(state[position], velocity, sigma)
                for name, velocity in zip(names, velocities, strict=True)
            }
            identity = None if self._unvoiced is None else self._unvoiced.stream.identity
            item.take(x0, self.step, identity)

    def _heard(self, item: "_Prepared", name: str) -> "_Prepared":
        """Return a stream as a pass has it."""
        if self._unvoiced is not None and item.sound and name == "unvoiced":
            return self._unvoiced
        return item

    def _passes(self, sigma: float) -> list[str]:
        needed: set[str] = {"cond"}
        for item in self._streams:
            needed |= item.stream.guidance.passes(self.step)
        if self._needs_uncond:
            needed.add("uncond")
        identity = None if self._unvoiced is None else self._unvoiced.stream.identity
        if identity is not None and identity.active(sigma):
            needed.add("unvoiced")
        return [name for name in PASSES if name in needed]

    def _inputs(
        self, state: State, sigma: float, active: list[bool], name: str
    ) -> dict[bool, StreamInput]:
        return {
            item.sound: replace(
                self._heard(item, name).input(x, sigma, negative=name == "uncond"), enabled=enabled
            )
            for item, x, enabled in zip(self._streams, state, active, strict=True)
            if item.present
        }

    def _pass(self, name: str, inputs: Mapping[bool, StreamInput], batch: int) -> Pass:
        perturbations = (self._perturbation(name),) * batch
        return Pass(inputs.get(False), inputs.get(True), perturbations)

    def _perturbation(self, name: str) -> Perturbation:
        if name == "isolated":
            return APART
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
        self.present = stream.state.tokens > 0
        self.rope: StreamRope | None = None
        if self.present:
            self.rope = transformer.rope(stream.state.positions, sound)

    def skips(self, step: int) -> bool:
        return self.stream.guidance.skips(step)

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
        x = x[:, : state.tokens]
        return StreamInput(
            latent=state.seen(x),
            sigma=torch.full((x.shape[0],), level, device=x.device),
            timesteps=Timesteps(self.levels.values * sigma, self.levels.index),
            positions=state.positions,
            context=context,
            weights=self.weights,
            rope=self.rope,
            context_bias=bias,
            avoided=avoided,
            moments=self.stream.moments,
            scales=self.stream.scales,
        )

    def x0(self, x: Tensor, velocity: Velocity, sigma: float) -> Tensor:
        predicted = velocity.audio if self.sound else velocity.video
        assert predicted is not None
        own, state = x[:, : self.stream.state.tokens], self.stream.state
        if state.mixed:  # ComfyUI steps by the whole sigma, whatever a token's level
            return state.seen(own) - predicted * sigma
        per_token = Timesteps(self.levels.values * sigma, self.levels.index).per_token()
        return own - predicted * per_token

    def take(self, x0: dict[str, Tensor], step: int, identity: Identity | None) -> None:
        self.guided = combine(
            x0["cond"],
            x0.get("uncond"),
            x0.get("perturbed"),
            x0.get("isolated"),
            self.stream.guidance,
            step,
        )
        if identity is not None and "unvoiced" in x0:
            self.guided = identity.led(self.guided, x0["cond"], x0["unvoiced"])
        if self.stream.control is not None:
            self.guided = self.stream.control.predicted(self.guided, step)
        self.uncond = x0.get("uncond", x0["cond"])


def _inputs_of(name: str) -> str:
    """Name the inputs of a pass; all others have those of the first."""
    return name if name in ("uncond", "unvoiced") else "cond"


def _without_voice(stream: Stream) -> Stream:
    """Return a stream's own tokens alone, and what is said of them."""
    own, bias, moments = stream.state.target, stream.prompt.bias, stream.moments
    if bias is not None:
        bias = replace(bias, row_ids=bias.row_ids[:own])
    if moments is not None:
        moments = moments.first(own)
    return replace(
        stream,
        state=without_appended(stream.state),
        prompt=replace(stream.prompt, bias=bias),
        moments=moments,
    )


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
