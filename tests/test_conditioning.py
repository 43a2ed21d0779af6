"""Latent states beyond the reference cases: groups, masks, refusals."""

import pytest
import torch

from ltxlite import conditioning
from ltxlite.conditioning import LatentState
from ltxlite.errors import RequestError, ShapeError
from ltxlite.geometry import AudioGrid, LatentGrid, audio_positions, video_positions

GRID = LatentGrid()


def video_state(frames: int = 2, rows: int = 1, columns: int = 3) -> LatentState:
    generator = torch.Generator().manual_seed(frames)
    tokens = torch.randn(1, frames * rows * columns, 5, generator=generator)
    return conditioning.start(tokens, video_positions((frames, rows, columns), 24.0, GRID))


def appended(state: LatentState, count: int, weight: float | list[float] | None) -> LatentState:
    positions = video_positions((1, 1, count), 24.0, GRID)
    values = None if weight is None else torch.tensor(weight).expand(count)
    return conditioning.append(state, torch.ones(1, 5, 1, 1, count), positions, 1.0, values)


def dense_by_rule(state: LatentState) -> torch.Tensor:
    """Write out the matrix as the official code builds it: group by group as they are appended."""
    dense, masked = torch.ones(state.target, state.target), False
    for group in state.groups:
        count = group.stop - group.start
        grown = torch.ones(group.stop, group.stop)
        grown[: group.start, : group.start] = dense
        masked = masked or group.weight is not None
        if masked:
            cross = torch.ones(count) if group.weight is None else group.weight
            grown[: state.target, group.start :] = cross
            grown[group.start :, : state.target] = cross[:, None]
            grown[state.target : group.start, group.start :] = 0
            grown[group.start :, state.target : group.start] = 0
        dense = grown
    return dense[None]


@pytest.mark.parametrize(
    "weights",
    [
        [None],
        [0.5],
        [None, None, 0.25],
        [0.5, None],
        [[0.0, 0.5, 1.0], 0.3],
        [None, 0.5, None, [1.0, 0.0]],
    ],
)
def test_attention_weights_equal_the_matrix_built_group_by_group(weights: list) -> None:
    state = video_state()
    for weight in weights:
        state = appended(state, len(weight) if isinstance(weight, list) else 2, weight)
    assert torch.equal(conditioning.dense_weights(state), dense_by_rule(state))


def test_no_weight_means_no_mask_at_all() -> None:
    state = appended(appended(video_state(), 2, None), 1, None)
    assert conditioning.attention_weights(state) == ()


def test_uniform_groups_share_one_row() -> None:
    rows = conditioning.attention_weights(appended(video_state(), 4, 0.5))
    assert [tuple(item.weights.shape) for item in rows] == [(1, 1, 10), (1, 1, 10)]


def test_what_is_appended_goes_where_the_state_is() -> None:
    # Positions and weights are made on the CPU; a card would refuse to index one by the other.
    state = video_state().to(torch.device("meta"))
    state = appended(state, 3, [1.0, 0.0, 0.5])
    (group,) = state.groups
    assert group.weight is not None
    tensors = (state.initial, state.clean, state.mask, state.positions, group.weight)
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_appended_tokens_start_from_zeros_and_hold_their_clean_values() -> None:
    state = appended(video_state(), 3, None)
    noise = torch.randn(1, state.tokens, 5, generator=torch.Generator().manual_seed(1))
    noised = state.noised(noise, 1.0)
    assert torch.equal(noised[:, : state.target], noise[:, : state.target])
    assert torch.equal(noised[:, state.target :], torch.ones(1, 3, 5))
    assert torch.equal(state.blend(noise)[:, state.target :], torch.ones(1, 3, 5))


def test_levels_hold_one_value_per_strength() -> None:
    state = conditioning.place_image(video_state(3), torch.zeros(1, 5, 1, 1, 3), 0, 0.75)
    levels = appended(state, 2, None).levels()
    assert levels.values.tolist() == [0.0, 0.25, 1.0]


def test_a_retake_frees_every_token_that_touches_the_interval() -> None:
    state = video_state(frames=4, columns=2)  # ends at 1/24, 9/24, 17/24, 25/24 s
    mask = conditioning.mask_interval(state, 9 / 24, 10 / 24).mask
    assert mask[0, :, 0].tolist() == [0, 0, 0, 0, 1, 1, 0, 0]
    sound = conditioning.start(torch.zeros(1, 10, 4), audio_positions(10, AudioGrid()))
    mask = conditioning.mask_interval(sound, 0.05, 0.09).mask
    assert mask[0, :, 0].tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 0, 0]


def test_a_kept_region_takes_its_tokens_from_the_source() -> None:
    state = video_state(1)
    keep = torch.tensor([[1.0, 0.0, 0.5]])
    region = conditioning.mask_region(state, torch.full((1, 5, 1, 1, 3), 2.0), keep)
    assert region.mask[0, :, 0].tolist() == [0.0, 1.0, 0.5]
    assert torch.equal(region.clean[0, 0], torch.full((5,), 2.0))
    assert torch.equal(region.clean[0, 1], state.clean[0, 1])


def test_references_of_fewer_frames_keep_time_and_start_at_zero() -> None:
    plain = video_positions((3, 1, 1), 24.0, GRID)
    sparse = conditioning.reference_positions((2, 1, 1), 24.0, GRID, spatial=2, temporal=2)
    assert sparse[0, 0, 0, 0] == 0
    # Latent frame 1 of every second frame covers what frames 1 and 2 of the clip cover.
    assert sparse[0, 0, 1, 1] == pytest.approx(float(plain[0, 0, 2, 1]))
    assert sparse[0, 1, 0].tolist() == [0.0, 64.0]


def test_impossible_conditions_are_refused() -> None:
    state = video_state()
    with pytest.raises(ShapeError, match="inside the clip"):
        conditioning.place_image(state, torch.zeros(1, 5, 1, 1, 3), 4, 1.0)
    with pytest.raises(RequestError, match="strength"):
        conditioning.place_image(state, torch.zeros(1, 5, 1, 1, 3), 0, 1.5)
    with pytest.raises(RequestError, match="empty"):
        conditioning.mask_interval(state, 2.0, 2.0)
    with pytest.raises(ShapeError, match="positions"):
        conditioning.append(state, torch.zeros(1, 5, 1, 1, 3), state.positions, 1.0)
