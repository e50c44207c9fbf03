"""Acceptance of estimators and intervals against known truths: populations, replicates, verdicts."""
