"""What the process that others are forked from imports (see processes.py)."""

import contextlib

import bvpo_stats.cli.main
import matplotlib.pyplot
import peft
import scipy.stats
import torch
import transformers.models.qwen2.modeling_qwen2

import bvpo_stats.lab.theorems.run
import bvpo_stats.studies.alpha_star.run
import bvpo_stats.studies.evaluate.run
import bvpo_stats.studies.train.run
import bvpo_stats.studies.variance.run
import bvpo_stats.training.trainer

with contextlib.suppress(ImportError):  # figures are left out without it
    import seaborn  # noqa: F401

__all__ = ["bvpo_stats", "matplotlib", "peft", "scipy", "torch", "transformers"]
