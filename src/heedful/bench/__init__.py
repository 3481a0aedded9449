"""What `heedful bench` does: every backend on real models' calls, side by side; loaded by that command only.

`work` makes a case into tensors and judges answers, `measure` times those that are right, `page` draws the report.
"""
