"""`plan`: what a job would take, from headers alone."""

import argparse
from typing import TYPE_CHECKING, Any

from ltxlite.cli import generate

if TYPE_CHECKING:
    from ltxlite.memory.budget import Budget
    from ltxlite.planning import JobPlan

EXAMPLE = """example:
  ltxlite plan --model ltx-2.3-22b-distilled-Q4_K_M.gguf --text-encoder gemma-3-12b-Q4_K_M.gguf \\
      --vae LTX23_video_vae_bf16.safetensors ... --size 1080p --vram 8GiB --ram 16GiB"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `generate`."""
    generate.add_arguments(parser)
    parser.epilog = EXAMPLE


def run(options: argparse.Namespace) -> int:
    """Build the request, plan it, print the plan; a job that cannot fit is an error."""
    from ltxlite.cli.jobs import load_job, new_job
    from ltxlite.cli.show import Terminal, print_result
    from ltxlite.pipeline import check, open_loras
    from ltxlite.planning import plan_job

    options.prompt = options.prompt or ""  # its length is not known yet anyway
    if options.dtype == "auto":
        options.dtype = "bfloat16"  # that of a card, on which the job is to run
    with Terminal(options.quiet) as terminal:
        request, networks = (load_job if options.job else new_job)(options, terminal.note)
        check(request, networks)
        budget = _card(generate.budget_of(options, networks.device), options)
        plan = plan_job(networks, request, budget, open_loras(request, networks))
    print_result("\n".join(plan.lines()), _values(plan), options.json)
    return 0


def _card(budget: "Budget | None", options: argparse.Namespace) -> "Budget":
    """Return the budget; where there is no GPU, that of the card that --vram stands for."""
    from dataclasses import replace

    from ltxlite.errors import RequestError
    from ltxlite.memory.budget import DEFAULT_RESERVE

    if budget is None or (options.vram is None and budget.vram > 1 << 60):
        raise RequestError("no GPU here: say which card to plan for, with --vram 8GiB")
    if options.reserve_vram is None:
        return replace(budget, reserve=DEFAULT_RESERVE)
    return budget


def _values(plan: "JobPlan") -> dict[str, Any]:
    """Return the plan as JSON: bytes."""
    return {
        "peak": plan.plan.peak,
        "usable": plan.plan.budget.usable,
        "pinned": plan.plan.pinned,
        "chunk": plan.levers.chunk,
        "group_bytes": plan.window.group_bytes,
        "tiles": not plan.window.is_whole,
        "phases": [
            {
                "phase": item.need.phase,
                "component": item.need.component,
                "peak": item.peak,
                "fixed": item.need.fixed,
                "activations": item.need.activations,
                "workspace": item.need.workspace,
                "walks": item.need.walks,
                "resident": sorted(item.residence.placement.resident) if item.residence else [],
                "slots": item.residence.placement.slots if item.residence else 0,
                "moved": item.residence.moved if item.residence else 0,
                "read": item.residence.read if item.residence else 0,
            }
            for item in plan.plan.phases
        ],
    }
