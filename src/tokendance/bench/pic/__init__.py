"""The baseline `pic`: reuse as CacheBlend does it, request by request, with copies."""

from tokendance.bench.pic.executor import PicExecutor
from tokendance.bench.pic.planner import OnePromptAtATime, PicPlanner, WholePrompts

__all__ = ["OnePromptAtATime", "PicExecutor", "PicPlanner", "WholePrompts"]
