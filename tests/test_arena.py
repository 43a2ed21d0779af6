"""Layouts hold every tensor of a module, and bindings move all of them at once."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from stream_stack import given, layers
from torch import nn

from ltxlite.errors import CheckpointError, ShapeError
from ltxlite.linear import QuantLinear
from ltxlite.memory.arena import (
    ALIGNMENT,
    PORTION_BYTES,
    FilePortion,
    FileRange,
    MovableModule,
    TensorPortion,
    divide,
    layout_of,
    whole,
)


def filled(movable: MovableModule) -> torch.Tensor:
    buffer = torch.empty(movable.layout.nbytes, dtype=torch.uint8)
    for item, tensor in zip(movable.layout.fields, movable.tensors(), strict=True):
        item.view(buffer).copy_(tensor)
    return buffer


def test_fields_are_aligned_do_not_overlap_and_name_every_tensor():
    layer = layers(1)[0]
    layout = layout_of(layer)
    assert {item.name for item in layout.fields} == layer.state_dict().keys()
    end = 0
    for item in layout.fields:
        assert item.offset % ALIGNMENT == 0 and item.offset >= end
        end = item.offset + item.nbytes
    assert end <= layout.nbytes < end + ALIGNMENT
    assert sum(item.nbytes for item in layout.fields) == sum(
        value.nbytes for value in layer.state_dict().values()
    )


def test_a_layout_is_known_before_there_are_values():
    assert layout_of(layers(1)[0].to("meta")) == layout_of(layers(1)[0])


def test_a_bound_module_computes_from_the_buffer_and_keeps_kinds_dtypes_and_shapes():
    layer = layers(1)[0]
    wanted = layer(given())
    before = {name: (v.dtype, v.shape) for name, v in layer.state_dict().items()}
    movable = MovableModule(layer)
    buffer = filled(movable)
    movable.release()
    movable.bind(movable.views(buffer))
    assert torch.equal(layer(given()), wanted)
    assert {name: (v.dtype, v.shape) for name, v in layer.state_dict().items()} == before
    assert isinstance(layer.inner.weight, nn.Parameter) and not layer.inner.weight.requires_grad
    assert not isinstance(layer.packed.blocks, nn.Parameter)
    buffer.fill_(0)
    assert not any(value.any() for value in layer.state_dict().values()), "views, not copies"


def test_between_bindings_a_module_is_shapes_without_bytes_and_refuses_to_run():
    layer = layers(1)[0]
    movable = MovableModule(layer)
    views = movable.views(filled(movable))
    movable.release()
    shapes = {name: value.shape for name, value in layers(1)[0].state_dict().items()}
    for _ in range(2):
        assert {name: value.shape for name, value in layer.state_dict().items()} == shapes
        assert all(value.is_meta for value in layer.state_dict().values())
        with pytest.raises(RuntimeError, match="a streamed Layer was called outside its turn"):
            layer(given())
        movable.bind(views)
        layer(given())
        movable.unbind()


def test_a_tensor_with_two_names_comes_once_and_moves_under_both():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(5, 5)
            self.second = nn.Linear(5, 5, bias=False)
            self.second.weight = self.first.weight

    tied = Tied()
    movable = MovableModule(tied)
    assert [item.name for item in movable.layout.fields] == ["first.weight", "first.bias"]
    buffer = filled(movable)
    movable.release()
    movable.bind(movable.views(buffer))
    assert tied.first.weight is tied.second.weight and not tied.first.weight.is_meta


def test_a_dropped_module_is_freed_without_the_garbage_collector():
    layer = layers(1)[0]
    MovableModule(layer).release()
    gone = weakref.ref(layer)
    gc.disable()
    try:
        del layer
        assert gone() is None
    finally:
        gc.enable()


def test_modules_without_values_or_with_odd_tensors_are_refused_by_name():
    with pytest.raises(CheckpointError, match="strength has no values"):
        MovableModule(layers(1)[0].to("meta"))
    odd = nn.Module()
    odd.register_buffer("table", torch.eye(3).to_sparse())
    with pytest.raises(ShapeError, match="table: only plain tensors"):
        layout_of(odd)


def test_origins_of_other_names_or_sizes_are_refused():
    movable = MovableModule(layers(1)[0])
    path = Path("model.gguf")
    with pytest.raises(ShapeError, match=r"inner.wait: the block has no tensor of that name"):
        divide(movable, {"inner.wait": FileRange(path, 0, 4)})
    with pytest.raises(ShapeError, match=r"shift takes 66 bytes, but 132 in model.gguf"):
        divide(movable, {"shift": FileRange(path, 0, 132)})


def test_portions_cover_every_byte_once_in_the_order_of_the_file():
    large = nn.Module()
    rows = PORTION_BYTES // 4 // 8 * 5 + 3  # two and a half portions, and some
    large.register_buffer("matrix", torch.zeros(rows, 4))
    for number in range(40):
        large.register_buffer(f"small{number}", torch.zeros(3 + number))
    movable = MovableModule(large)
    sizes = {item.name: item.nbytes for item in movable.layout.fields}
    origins, end = {}, 1000
    for name in reversed(sizes):  # the file has them the other way round
        origins[name] = FileRange(Path("file"), end, sizes[name])
        end += sizes[name] + 7
    del origins["small5"]
    *files, kept = divide(movable, origins)
    assert isinstance(kept, TensorPortion) and [i.name for i, _ in kept.items] == ["small5"]
    assert all(isinstance(part, FilePortion) for part in files)
    spans = [span for part in files for span in part.spans]
    assert [span.source for span in spans] == sorted(span.source for span in spans)
    assert sum(span.nbytes for span in spans) == sum(sizes.values()) - sizes["small5"]
    assert all(sum(span.nbytes for span in part.spans) <= PORTION_BYTES for part in files)
    assert len(files) == 1 + 3, "small tensors share a portion"
    offsets = {item.name: item.offset for item in movable.layout.fields}
    places = {
        (origin.offset + start, offsets[name] + start)
        for name, origin in origins.items()
        for start in range(0, origin.nbytes, PORTION_BYTES)
    }
    assert {(span.source, span.target) for span in spans} == places


def test_a_whole_buffer_is_divided_without_a_copy():
    buffer = torch.arange(PORTION_BYTES + 5, dtype=torch.int64).to(torch.uint8)
    target = torch.zeros_like(buffer)
    for portion in whole(buffer):
        for item, tensor in portion.items:
            assert tensor.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
            item.view(target).copy_(tensor)
    assert torch.equal(target, buffer) and len(whole(buffer)) == 2


def test_a_quantized_linear_without_bias_stays_without():
    layer = layers(1)[0]
    assert isinstance(layer.packed, QuantLinear)
    movable = MovableModule(layer)
    movable.release()
    assert layer.packed.bias is None
