"""Kernels compiled without a card: the table is whole, and what it forbids is found."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
from kernel_device import INTERPRETED

from benchmarks import compile as command
from benchmarks import sass

triton = pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("the interpreter's kernels cannot be compiled", allow_module_level=True)

# One of each operation: all of them take minutes, `python -m benchmarks compile` checks them.
SUBSET = (
    "dequant Q4_K bf16",
    "int8_codes Q6_K signs_128",
    "norm 4096 regular_256 fp16",
    "matmul_int8 257+ bias gate residual",
    "matmul_fp16 257+ bias gelu",
    "norm_rope 4096 axes 3",
    "norm_silu windows 512",
    "attend int8 128 128x64 whole",
)


@pytest.fixture(scope="module")
def rows() -> dict[int, list[command.Row]]:
    architectures = (86, 90, 120)
    found = list(command.compiled(architectures, SUBSET, jobs=min(2, os.cpu_count() or 1)))
    return {one: [row for row in found if row["arch"] == one] for one in architectures}


@pytest.mark.parametrize("architecture", [86, 90, 120])
def test_kernels_compile_as_the_table_says(rows, architecture):
    recorded = command.read().get(triton.__version__, {})
    found = rows[architecture]
    assert sorted(row["kernel"] for row in found) == sorted(SUBSET)
    assert [text for row in found for text in command.problems(row, recorded)] == []


def test_hot_loops_read_16_bytes_at_a_time_and_mostly_multiply(rows):
    for row in (row for found in rows.values() for row in found if "matmul_int8" in row["kernel"]):
        instructions, tensor = row["loop"]
        assert tensor
        # An IGMMA of Hopper does what 32 of the others do.
        assert instructions / tensor < (4 if row["arch"] != 90 else 40)
        assert row["loads"]["16"] >= 4
        assert "1" not in row["loads"]


def test_the_table_has_every_kernel_of_every_card():
    from ltxlite_kernels.specimens import ARCHITECTURES, specimens

    assert command.ARCHITECTURES == ARCHITECTURES == tuple(command.SHARED)
    wanted = {f"{one.name} sm_{arch}" for arch in ARCHITECTURES for one in specimens(arch)}
    table = command.read()
    assert table
    for version, lines in table.items():
        assert set(lines) == wanted, version


def good() -> dict[str, Any]:
    return {
        **{"kernel": "k", "arch": 86, "tensor_core": "int8", "byte_loads": False},
        **{"registers": 100, "spills": 0, "shared": 1000, "loop": [90, 32]},
        **{"tensor": {"IMMA": 32}, "loads": {"16": 4}},
    }


def bad() -> Iterator[tuple[dict[str, Any], str]]:
    yield {"error": "RuntimeError: no"}, "does not compile"
    yield {"spills": 2}, "2 loads and stores of spilled"
    yield {"shared": 101377}, "101376 allowed"
    yield {"tensor": {"HMMA": 32}}, "wanted IMMA or IGMMA"
    yield {"tensor_core": "int8 fp16"}, "wanted IMMA or IGMMA, and HMMA or HGMMA"
    yield {"tensor": {}}, "wanted"
    yield {"tensor_core": None}, "wanted none"
    yield {"loads": {"1": 3}}, "3 loads of a single byte"
    yield {"registers": 111}, "111 registers, 100 in the table"
    yield {"loop": [100, 32]}, "100 instructions in the hot loop, 90"
    yield {"kernel": "other"}, "not in the table"


@pytest.mark.parametrize(("change", "message"), list(bad()))
def test_every_regression_is_found(change, message):
    recorded = {"k sm_86": good()}
    assert command.problems(good(), recorded) == []
    assert command.problems(good() | {"registers": 110}, recorded) == []
    (found,) = command.problems(good() | change, recorded)
    assert message in found


def test_rewriting_some_lines_keeps_the_others(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "TABLE", tmp_path / "table.json")
    line = good() | {"instructions": 5, "stores": {}, "ptx": []}
    command.write("3.9.0", [line, line | {"arch": 90}], whole=True)
    command.write("3.9.0", [line | {"registers": 7}], whole=False)
    command.write("3.6.0", [line], whole=True)
    table = command.read()
    assert {key: row["registers"] for key, row in table["3.9.0"].items()} == {
        "k sm_86": 7,
        "k sm_90": 100,
    }
    assert list(table) == ["3.6.0", "3.9.0"]
    command.write("3.9.0", [line], whole=True)
    assert list(command.read()["3.9.0"]) == ["k sm_86"]


LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;                 /* 0x0 */
        /*0010*/                   LDGSTS.E.BYPASS.128 [R1], [R2.64] ;    /* 0x1 */
        /*0020*/                   IMMA.16832.S8.S8.SAT R4, R1, R2, R4 ;  /* 0x2 */
        /*0030*/                   IMMA.16832.S8.S8.SAT R8, R1, R2, R8 ;
        /*0040*/              @!P0 STL [R1], R4 ;
        /*0050*/               @P1 BRA 0x20 ;
        /*0060*/                   IMMA.16832.S8.S8.SAT R8, R1, R2, R8 ;
        /*0070*/               @P2 BRA 0x10 ;
        /*0080*/                   LDL R4, [R1] ;
        /*0090*/                   BRA 0x90 ;
"""


def test_machine_code_is_read():
    code = sass.instructions(LISTING)
    assert len(code) == 10
    assert sass.spills(code) == 2
    assert sass.tensor_names(code) == {"IMMA": 3}
    assert sass.hot_loop(code) == (7, 3)
    assert sass.hot_loop(code[:6]) == (4, 2)
    assert sass.hot_loop(code[:5]) == (0, 0)


def test_ptx_is_read():
    ptx = """
        @%p1 ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [ %rd1 + 0 ];
        @%p1 ld.global.b16 { %rs1 }, [ %rd2 + 0 ];
        ld.global.L1::evict_last.b8 %rs2, [%rd2];
        cp.async.cg.shared.global [ %r9 + 0 ], [ %rd3 + 0 ], 0x10, %r10;
        cp.async.ca.shared.global [%r9], [%rd3], 4;
        st.global.v2.b32 [ %rd4 + 0 ], { %r1, %r2 };
        st.shared.b32 [%r1], %r2;
        mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32 {%r1}, {%r2};
    """
    assert sass.accesses(ptx) == ({1: 1, 2: 1, 4: 1, 16: 2}, {8: 1})
    assert sass.ptx_tensor(ptx) == ["mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32"]
