"""The house rules as tests: who may import whom, what imports where, what --help costs."""

import ast
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "ltxlite": ROOT / "ltxlite",
    "ltxlite_kernels": ROOT / "kernels" / "ltxlite_kernels",
    "ltxlite_quant": ROOT / "quant" / "ltxlite_quant",
}
OWN = tuple(PACKAGES)
# Read when a module is imported and absent on Windows; none may be needed there.
POSIX_ONLY = ("fcntl", "resource", "termios", "pwd", "grp", "posix", "pty", "tty", "syslog")


def modules() -> list[str]:
    names = []
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if parts[-1] == "__main__":
                continue
            names.append(".".join((package, *(part for part in parts if part != "__init__"))))
    return names


def source_of(module: str) -> Path:
    package, *rest = module.split(".")
    path = PACKAGES[package].joinpath(*rest)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imports_of(module: str) -> set[str]:
    """Return what a module imports, wherever in the file; TYPE_CHECKING blocks do not count."""
    tree = ast.parse(source_of(module).read_text(encoding="utf-8"))
    hidden = [
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    ]
    found = set()
    for node in ast.walk(tree):
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def offending(users: str, *banned: str, allowed: tuple[str, ...] = ()) -> list[str]:
    """Return `user -> import` for modules matching `users` that import something banned."""
    return [
        f"{module} -> {name}"
        for module in modules()
        if re.fullmatch(users, module)
        for name in imports_of(module)
        if name.startswith(banned) and not name.startswith(allowed)
    ]


def test_the_quant_package_knows_no_kernels_no_models_and_no_modules() -> None:
    assert not offending(r"ltxlite_quant.*", "ltxlite.", "ltxlite_kernels", "triton", "torch.nn")


def test_the_kernel_package_knows_only_formats_and_decoders_of_quant() -> None:
    banned = ("ltxlite.", "ltxlite_quant", "torch.nn")
    allowed = ("ltxlite_quant.formats", "ltxlite_quant.decode", "torch.nn.functional")
    found = offending(r"ltxlite_kernels.*", *banned, allowed=allowed)
    assert not [item for item in found if not item.endswith("-> ltxlite_quant")]


def test_networks_know_neither_files_nor_storage() -> None:
    banned = ("ltxlite_quant", "ltxlite.checkpoint", "ltxlite.memory", "ltxlite.linear")
    assert not offending(r"ltxlite\.models.*", *banned)
    others = ("ltxlite.pipeline", "ltxlite.networks", "ltxlite.cli", "ltxlite.request")
    assert not offending(r"ltxlite\.models.*", *others)


def test_checkpoint_and_memory_know_no_particular_network() -> None:
    assert not offending(r"ltxlite\.(checkpoint|memory).*", "ltxlite.models")


def test_only_linears_and_their_arithmetic_join_quant_and_kernels() -> None:
    joined = [
        module
        for module in modules()
        if module.startswith("ltxlite.")
        and {"ltxlite_quant", "ltxlite_kernels"} <= {n.split(".")[0] for n in imports_of(module)}
    ]
    assert joined == ["ltxlite.linear", "ltxlite.math_mode"]


def test_networks_use_kernels_and_nobody_else_does() -> None:
    # An account states what kernels take.
    users = r"ltxlite\.(?!models|linear$|arithmetic$|math_mode$|account).*"
    assert not offending(users, "ltxlite_kernels")


def test_only_the_command_line_imports_the_pipeline() -> None:
    assert not offending(r"ltxlite\.(?!cli|pipeline).*|ltxlite_.*", "ltxlite.pipeline")


def test_errors_import_nothing_of_ours_and_requests_no_torch() -> None:
    assert not offending(r"ltxlite\.errors", *OWN)
    assert not offending(
        r"ltxlite\.request",
        *OWN,
        "torch",
        allowed=(
            "ltxlite.conditions",
            "ltxlite.errors",
            "ltxlite.sampling.settings",
            "ltxlite.strength",
            "ltxlite.tuning",
        ),
    )
    checks = ("ltxlite.errors", "ltxlite.record_checks")
    assert not offending(
        r"ltxlite\.conditions", *OWN, "torch", allowed=(*checks, "ltxlite.hearing")
    )
    assert not offending(r"ltxlite\.hearing", *OWN, "torch", allowed=checks)
    assert not offending(r"ltxlite\.record_checks", *OWN, "torch", allowed=("ltxlite.errors",))


def test_nothing_of_ours_imports_tests_or_benchmarks() -> None:
    assert not offending(r".*", "tests", "benchmarks", "pytest")


def test_source_roots_are_no_packages() -> None:
    # `kernels` is Hugging Face's import name; an __init__.py here would hide or break theirs.
    for folder in ("kernels", "quant", "tests"):
        assert not (ROOT / folder / "__init__.py").exists()


def is_device_code(module: str) -> bool:
    """Tell modules that only other kernels import, where they have found Triton."""
    text = source_of(module).read_text(encoding="utf-8")
    return module.startswith("ltxlite_kernels.") and "\nimport triton\n" in text


@pytest.mark.parametrize("without", [POSIX_ONLY, ("triton",)], ids=["posix", "triton"])
def test_every_module_imports_without(without: tuple[str, ...]) -> None:
    # A module set to None in sys.modules raises ImportError, as on a machine without it. torch and
    # friends are imported first: what they need of the system is their affair.
    names = [name for name in modules() if "triton" not in without or not is_device_code(name)]
    code = (
        "import sys, json, torch, numpy, av, PIL, rich.progress, sentencepiece, tokenizers\n"
        "import rich.console, PIL.Image, PIL.ImageOps, PIL.ImageCms\n"
        f"for name in {without!r}: sys.modules[name] = None\n"
        "import importlib\n"
        f"for name in json.loads({json.dumps(json.dumps(names))}): "
        "importlib.import_module(name)\n"
    )
    run_python(code)


def test_no_file_has_more_than_400_lines() -> None:
    sources = [
        path
        for folder in ("ltxlite", "kernels", "quant", "benchmarks", "tests")
        for path in (ROOT / folder).rglob("*.py")
    ]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources}
    assert not {path.name: count for path, count in lengths.items() if count > 400}


def test_help_answers_at_once_and_imports_no_torch() -> None:
    # The issue allows 0.3 s on a quiet machine; the best of five is what the code costs.
    best = min(_help_seconds() for _ in range(5))
    assert best < 0.3
    run_python(
        "import sys, ltxlite.cli\n"
        "for verb in ltxlite.cli.VERBS:\n"
        "    try: ltxlite.cli.main([verb, '--help'])\n"
        "    except SystemExit as stop: assert stop.code == 0\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )


def _help_seconds() -> float:
    since = time.perf_counter()
    run_python("import sys, ltxlite.cli; ltxlite.cli.main(['generate', '--help'])")
    return time.perf_counter() - since


def test_the_readme_names_every_verb_and_its_two_commands_are_the_ones_ci_runs() -> None:
    from ltxlite.cli import VERBS

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for verb in VERBS:
        assert f"ltxlite {verb}" in readme
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    command = re.search(r"```sh tests\n(.+?)\n```", readme, re.DOTALL)
    assert command, "README marks its test command with ```sh tests"
    assert "sh tests" in ci, "CI takes the command from the README"


def run_python(code: str) -> None:
    """Run code in a fresh interpreter with the three source roots on its path."""
    roots = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "quant")]
    preamble = f"import sys; sys.path[:0] = {roots!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", preamble + code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
