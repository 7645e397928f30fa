"""Range estimators: they choose the initial ranges of quantizers."""
