"""Puts images, guides and IC-LoRA references into the picture's state.

Source: LTX-2 400fd31 (ltx_core/conditioning), ComfyUI's LTXVImgToVideoInplaceKJ for frames other
than the first; restated in features.md E2 to E7, F1 and model.md 7.
"""

import torch
from torch import Tensor

from ltxlite import conditioning
from ltxlite.conditioning import LatentState, StageContext, States
from ltxlite.conditions import AFTER, BEFORE, Conditions, Guide, Image, frame_at, of_stage
from ltxlite.given import StageGiven


def steer_images(
    states: States, conditions: Conditions, given: StageGiven, stage: StageContext
) -> States:
    """Replace frames of the clip by images; a later one wins where two meet."""
    video, audio = states
    per_frame = stage.shape.rows * stage.shape.columns
    for image, latent in zip(conditions.images, given.images, strict=True):
        first = image_frame(image, stage) * per_frame
        strength = of_stage(image.strengths, stage.number)
        video = conditioning.place_image(video, latent, first, strength)
    return video, audio


def image_frame(image: Image, stage: StageContext) -> int:
    """Return the latent frame that an image replaces: pixel frame // 8, as KJ's node rounds.

    A guide for the same frame stands one further on, unless the frame is a multiple of 8.
    """
    frame = frame_at(image.at, stage.frames, stage.rate, f"image {image.path}")
    return frame // stage.grid.time


def steer_guides(
    states: States, conditions: Conditions, given: StageGiven, stage: StageContext
) -> States:
    """Append guides, each as a group of its own, in the request's order."""
    video, audio = states
    for guide, latent in zip(conditions.guides, given.guides, strict=True):
        frame = guide_frame(guide, given, stage)
        frames = 1 if latent.shape[2] == 1 else stage.grid.pixel_frames(latent.shape[2])
        if guide.at == AFTER:
            frames = stage.grid.time
        elif guide.comfy and frame > 0 and frames > 1:
            latent = latent[:, :, 1:]  # encoded for the sake of the others
            if latent.shape[2] > 1:
                frame = stage.grid.first_frame(stage.grid.latent_index(frame))
        positions = conditioning.keyframe_positions(
            _extent(latent), frame, frames, stage.shape.fps, stage.grid
        )
        weight = attention_weight(guide.attention, positions.shape[2])
        strength = of_stage(guide.strengths, stage.number)
        video = _append(video, latent, positions, strength, weight)
    return video, audio


def guide_frame(guide: Guide, given: StageGiven, stage: StageContext) -> int:
    """Return the pixel frame that a guide stands for; "ref" is one latent frame before 0.

    "after" is behind the first reference, where LoRA files expect images that were trained as
    [references | clip], or behind the clip in stages that see none (features.md E9).
    """
    if guide.at == BEFORE:
        return -stage.grid.time
    if guide.at == AFTER:
        seen = given.references[:1]
        lengths = [stage.grid.pixel_frames(r.latent.shape[2]) * r.temporal for r in seen]
        return lengths[0] if lengths else stage.frames
    return frame_at(guide.at, stage.frames, stage.rate, f"guide {guide.path}")


def steer_references(
    states: States, conditions: Conditions, given: StageGiven, stage: StageContext
) -> States:
    """Append the reference clips that this stage sees."""
    video, audio = states
    for reference in given.references:
        positions = conditioning.reference_positions(
            _extent(reference.latent),
            stage.shape.fps,
            stage.grid,
            reference.downscale,
            reference.temporal,
        )
        video = _append(video, reference.latent, positions, reference.strength, reference.weight)
    return video, audio


def attention_weight(attention: float, count: int) -> Tensor | None:
    """Return an attention of 0 to 1 for so many tokens; None where nothing is weakened."""
    return None if attention == 1 else torch.full((count,), attention)


def _append(
    state: LatentState, latent: Tensor, positions: Tensor, strength: float, weight: Tensor | None
) -> LatentState:
    placed = None if weight is None else weight.to(state.mask)
    return conditioning.append(state, latent.to(state.clean), positions, strength, placed)


def _extent(latent: Tensor) -> tuple[int, int, int]:
    frames, rows, columns = latent.shape[2:]
    return frames, rows, columns
