"""What the paper does not speak of: the machinery around an experiment."""
