"""What a training run is made of, whatever it learns: schedules, optimisers, the loop; no Ray."""
