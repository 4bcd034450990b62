"""Defaults for a user's own data, which follow from its size. assets/defaults.py measures them."""

import math
from types import SimpleNamespace
from typing import Any

from optimization import paper_lr
from settings import BATCH_LIMITS, RECIPE_OF_TASK, RECIPES, format_option

# A batch is a 32nd of the data, within these bounds, in sentences or tokens.
BATCHES = {"classification": ("batch_size", 8, 64), "translation": ("batch_tokens", 256, 1024)}
# An epoch of few steps is repeated until there are so many steps, but not more than so many times.
LEAST_STEPS = {"classification": 1000, "translation": 4000}
MOST_EPOCHS = 60
FITTED = BATCH_LIMITS | {"ensemble", "epochs", "warmup_steps", "lr"}
MOST_FOR_ENSEMBLE = 10_000  # sentences of a classifier; with more, one model is trained


def has_fitted_defaults(options: SimpleNamespace) -> bool:
    """Whether the defaults follow from the size of the data: those of other data are fixed."""
    return options.dataset not in RECIPES and not options.workload


def fit_sizes(options: SimpleNamespace, given: dict[str, Any], n_sentences: int) -> list[str]:
    """Sets the size of a batch and of the ensemble, unless given. Returns the options changed."""
    if not has_fitted_defaults(options):
        return []
    name, least, most = BATCHES[options.task]
    fitted = {}
    if not BATCH_LIMITS & given.keys():
        size = n_sentences // 32
        if name == "batch_tokens":  # which must hold the longest sentence
            size, least = 8 * size, max(least, options.max_length)
        fitted[name] = max(least, min(most, size))
    if options.ensemble > 1 and "ensemble" not in given:
        fitted["ensemble"] = 1 if n_sentences > MOST_FOR_ENSEMBLE else options.ensemble
    vars(options).update(fitted)
    return [format_option(name, value) for name, value in fitted.items()]


def fit_epochs(options: SimpleNamespace, given: dict[str, Any], steps_per_epoch: int) -> list[str]:
    """Sets epochs, warm-up and the learning rate, unless given. Returns the options changed."""
    if not has_fitted_defaults(options):
        return []
    least = LEAST_STEPS[options.task]
    fitted = {"epochs": min(MOST_EPOCHS, max(options.epochs, math.ceil(least / steps_per_epoch)))}
    n_steps = given.get("epochs", fitted["epochs"]) * steps_per_epoch
    n_steps = min(n_steps, given.get("max_steps", n_steps))
    fitted["warmup_steps"] = max(1, min(options.warmup_steps, n_steps // 8))
    fitted = {name: value for name, value in fitted.items() if name not in given}
    if "lr" not in given and "lr" not in RECIPES[RECIPE_OF_TASK[options.task]]:
        warmup_steps = fitted.get("warmup_steps", options.warmup_steps)
        options.lr = paper_lr(d_model=options.d_model, warmup_steps=warmup_steps)
    vars(options).update(fitted)
    return [format_option(name, value) for name, value in fitted.items()]
