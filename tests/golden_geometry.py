"""Runners of the reference cases that exercise schedules, positions and rotary tables."""

from collections.abc import Callable

import torch
from golden_support import Case, Outputs
from torch import Tensor

from ltxlite.geometry import (
    AudioGrid,
    LatentGrid,
    audio_positions,
    midpoints,
    patchify_audio,
    patchify_video,
    video_positions,
)
from ltxlite.models.rope import RopeSpec, rope_table
from ltxlite.sampling import schedules


def run_schedules(case: Case) -> Outputs:
    tables = {
        "distilled_stage1": schedules.TABLES["distilled"],
        "distilled_stage2": schedules.TABLES["stage2"],
    }
    formulas: dict[str, Callable[..., object]] = {
        "ltx2": schedules.ltx,
        "linear_quadratic": schedules.linear_quadratic,
        "beta": schedules.beta,
        "simple": schedules.simple,
    }
    outputs = {name: torch.tensor(values) for name, values in tables.items()}
    for name, params in case.variants():
        formula = formulas[name.rsplit("_", 1)[0]]
        outputs[name] = torch.tensor(formula(**params))
    return outputs


def run_positions(case: Case) -> Outputs:
    outputs: Outputs = {}
    params = case.params
    for frames, fps, count in params.pop("audio_count", ()):
        assert AudioGrid().latent_frames(frames, fps) == count, (frames, fps)
    audio = AudioGrid()
    for name, p in params.items():
        if name.startswith("video_"):
            grid = LatentGrid(p["scale"][0], p["scale"][1])
            shape = (p["frames"], p["height"], p["width"])
            outputs[name] = video_positions(shape, p["fps"], grid)
        else:
            assert p["causal"], "only causal audio positions exist"
            audio = AudioGrid(p["sr"], p["hop"], p["downsample"])
            outputs[name] = audio_positions(p["frames"], audio)
    for name, stored in case.expected.items():
        if name.startswith("audio_shift"):
            first = int(name.removeprefix("audio_shift"))
            outputs[name] = audio_positions(stored.shape[2], audio, first)
    outputs["video_tokens"] = patchify_video(case.given("video_latent"))
    outputs["audio_tokens"] = patchify_audio(case.given("audio_latent"))
    return outputs


def run_rope(case: Case) -> Outputs:
    outputs: Outputs = {}
    for name, p in case.variants():
        layout, precision, which = name.split(".")
        theta, float64 = p.get("theta", 10000.0), precision == "float64"
        spec = RopeSpec(p["dim"], p["heads"], tuple(p["max_pos"]), theta, layout, float64)
        rope = rope_table(_rope_positions(case, name, which, p), spec)
        outputs[f"{name}.cos"] = _table(rope.cos, layout)
        outputs[f"{name}.sin"] = _table(rope.sin, layout)
        if name == f"{layout}.float64.video" and case.get(f"x_{layout}") is not None:
            outputs[f"applied_{layout}"] = rope.rotate(case.given(f"x_{layout}"))
    return outputs


def _rope_positions(case: Case, name: str, which: str, p: dict) -> Tensor:
    if not p["middle"]:
        count = case.tensors[f"{name}.cos"].shape[-2]
        return (torch.arange(count) * p["token_stride"]).float()[None, None]
    source = "audio_positions" if which.endswith("audio") else "video_positions"
    positions = midpoints(case.given(source))[:, :, :: p["token_stride"]]
    return positions[:, : len(p["max_pos"])]


def _table(values: Tensor, layout: str) -> Tensor:
    """Our split tables are (B, T, H, D/2); the reference stores (B, H, T, D/2)."""
    return values.transpose(1, 2) if layout == "split" else values


def run_rope_real_dims(case: Case) -> Outputs:
    outputs: Outputs = {}
    grid = case.params["grid"]
    frames, rows, columns = grid["latent"]
    whole = {
        "video": video_positions((frames, rows, columns), grid["fps"], LatentGrid()),
        "audio": audio_positions(grid["audio_frames"], AudioGrid()),
    }
    for name, p in case.params.items():
        if name == "grid":
            continue
        stream = name.removeprefix("cross_")
        positions = case.given(f"{stream}_positions")
        index = case.tensors[f"{stream}_token_index"]
        assert torch.equal(whole[stream][:, :, index], positions), "positions of the real grid"
        middle = midpoints(positions)[:, : len(p["max_pos"])]
        rope = rope_table(middle, RopeSpec(p["dim"], p["heads"], tuple(p["max_pos"])))
        outputs[f"{name}.cos"] = rope.cos.transpose(1, 2)
        outputs[f"{name}.sin"] = rope.sin.transpose(1, 2)
        outputs[f"{stream}_token_index"] = index
    return outputs


GEOMETRY_KINDS = {
    "schedules": run_schedules,
    "positions": run_positions,
    "rope": run_rope,
    "rope_real_dims": run_rope_real_dims,
}
