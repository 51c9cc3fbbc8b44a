"""Scores: `score(pred) -> (batch,)`, higher = more unlike the training data, for every score."""

from bayescal.scores.output import entropy, free_energy, max_probability, mutual_information

__all__ = ["entropy", "free_energy", "max_probability", "mutual_information"]
