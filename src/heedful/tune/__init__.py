"""Measuring ahead of time: inputs for a problem, and which candidate is fastest on them."""
