"""How near reused KV is to exact: targets and their tables, shadows, measuring, calibrating."""
