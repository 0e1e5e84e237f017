"""Restricted Boltzmann machines and deep belief networks for any data matrix, on the mathematics of `modeling_blip_rbm.rbm`."""

from .estimator import RBM, DeepBeliefNetwork
from .likelihood import annealed_importance_sampling, log_partition_function, log_prob


__all__ = ["RBM", "DeepBeliefNetwork", "annealed_importance_sampling", "log_partition_function", "log_prob"]
