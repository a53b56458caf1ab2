"""Which direction of a score is better, as far as its name tells."""

import re

MODES = ("max", "min")

LOSSES = frozenset(
    """
    ade assd bce bits bpb bpc bpd brier ce cer chamfer cost cpwer crps deviance der distance divergence ece eer emd
    entropy epe err error errors fde fdr fid fnr fpr frr fvd hausdorff hd hinge huber kid kl kld logcosh loss losses
    lpips mad mae mape mase mce mdae medae mer misclassification mpe mpjpe mre mse msle nats nll nlpd nrmse penalty
    perplexity poisson ppl rae regret residual rmse rmsle rse smape wape wer wil xent
    """.split()  # noqa: SIM905 - a list of so many strings could not be read
)
"""Words in the name of a metric of which less is better."""
LOSS_ENDINGS = ("loss", "losses", "error", "errors", "entropy")
"""How words end that are losses too: `logloss`, `crossentropy`."""


def mode_of(metric_name: str) -> str:
    """What is better of a metric, by its name alone: `"min"` where its words are those of a loss, else `"max"`.

    Example:
        >>> [mode_of(name) for name in ("val_loss", "BCEWithLogitsLoss", "categorical_crossentropy", "initial_wer")]
        ['min', 'min', 'min', 'min']
        >>> [mode_of(name) for name in ("accuracy", "neg_mean_squared_error", "log_likelihood", "glossary")]
        ['max', 'max', 'max', 'max']
    """
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", metric_name)]
    negated = "neg" in words or ("negative" in words and "false" not in words)
    loss = any(word in LOSSES or word.endswith(LOSS_ENDINGS) for word in words)
    loss = loss or ("false" in words and "rate" in words)
    # scikit-learn negates losses, so that more is better of every score; a likelihood is negated to become a loss.
    return "min" if (negated if "likelihood" in words else loss and not negated) else "max"
