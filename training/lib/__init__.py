"""What the stages of training share."""
