"""What networks are trained on: labels with DRLoc beside them. The loop is in training/."""
