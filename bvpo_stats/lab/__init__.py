"""The exact side: an enumerable model, the theorems as checks, acceptance of estimators, the embedded recipe."""
