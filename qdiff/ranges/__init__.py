"""How first ranges of quantizers are found."""
