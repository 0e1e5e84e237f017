"""Questions whose answers are not on the way to the product: one folder each, with its README, command and results."""
