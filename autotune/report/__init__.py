"""What people look at after a run: the report, in words why, and two runs side by side."""
