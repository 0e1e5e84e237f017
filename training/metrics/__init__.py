"""Caption metrics as modules of `evaluate`: `evaluate.load("training/metrics/cider_d.py")`. The functions are in
`training.lib.metrics`."""


def __getattr__(name: str):
    import warnings

    from training.lib import metrics

    if name not in metrics.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{name} is in training.lib.metrics now", DeprecationWarning, stacklevel=2)
    return getattr(metrics, name)
