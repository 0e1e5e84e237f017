"""What else could stand in the place of the RBM (see README.md)."""

from experiments.controls.stand_ins import STAND_INS, StandIn


__all__ = ["STAND_INS", "StandIn"]
