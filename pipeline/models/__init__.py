"""Images to patch features: the contract, the networks that keep it, where weights come from."""
