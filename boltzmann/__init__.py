"""Restricted Boltzmann machines and deep belief networks for any data matrix; README.md has a map of the files."""

from .estimator import RBM, DeepBeliefNetwork
from .likelihood import annealed_importance_sampling, log_partition_function, log_prob


__all__ = ["RBM", "DeepBeliefNetwork", "annealed_importance_sampling", "log_partition_function", "log_prob"]
