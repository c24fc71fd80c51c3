"""Weights in and out: checkpoints made from published weights, and published forms made from checkpoints."""
