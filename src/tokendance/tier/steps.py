"""Work in steps, between which the engine goes on: nobody waits for the disk on its thread.

What has to wait is a job on another thread. Steps yield it, and are to go on when it is done:

    engine's thread   step | pass, pass ... | step | pass ... | step: the result
    other threads          | job            |      | job      |
"""

from collections.abc import Generator
from concurrent.futures import Future, wait
from typing import Any, TypeVar

Result = TypeVar("Result")

Steps = Generator[Future[Any], None, Result]
"""Yields a job before each next step, which does nothing until that is done; returns a result."""


def awaited(job: Future[Result]) -> Steps[Result]:
    """Wait for a job, whose error is raised; return its result."""
    while not job.done():
        yield job
    return job.result()


def finish(steps: Steps[Result]) -> Result:
    """Do all that is left of some steps now, and wait for their jobs."""
    try:
        while True:
            wait([next(steps)])
    except StopIteration as end:
        result: Result = end.value
        return result
    finally:
        steps.close()  # if this is interrupted
