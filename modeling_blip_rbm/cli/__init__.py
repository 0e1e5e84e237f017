"""The commands of `blip-rbm`, a file each, and what they share."""
