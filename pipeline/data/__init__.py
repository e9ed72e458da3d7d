"""Images, collections and ground truth, and THE table in which the stages meet."""
