"""What a run will need, before it is launched: memory a GPU by part, tokens a second, days and cost by stage.

`plan` puts it together from `memory` (what is held) and `step_time` (what takes time) for one GPU's `Work`;
`comparisons` sets the formula against what the GPU benchmark has measured.
"""

from danube_ray.planner.hardware import GIB, H100, HARDWARE, USABLE, Hardware, hardware_named, parse_hardware
from danube_ray.planner.measured import PUBLISHED, Comparison, comparisons
from danube_ray.planner.memory import Memory, memory
from danube_ray.planner.pricing import Plan, StagePlan, plan, stage_work
from danube_ray.planner.speed import StepTime, step_time
from danube_ray.planner.work import Work

__all__ = [
    "GIB",
    "H100",
    "HARDWARE",
    "PUBLISHED",
    "USABLE",
    "Comparison",
    "Hardware",
    "Memory",
    "Plan",
    "StagePlan",
    "StepTime",
]
__all__ += ["Work", "comparisons", "hardware_named", "memory", "parse_hardware", "plan", "stage_work", "step_time"]
