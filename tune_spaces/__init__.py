"""What a sweep may turn: METRIC, MODE and SPACE per job, with a reason per range."""
