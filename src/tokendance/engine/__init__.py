"""The loop: schedule, run, postprocess."""
