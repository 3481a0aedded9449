"""One file per strategy; whatever stands here is found by scanning."""
