"""Thin entry points for `ray job submit`: parse, call, exit code."""
