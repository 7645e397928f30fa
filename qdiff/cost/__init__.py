"""Size and bit operations of a network."""
