"""What runs on the device: functions that Triton compiles, or interprets, and nothing else."""
