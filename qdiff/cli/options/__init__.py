"""The options that command lines share, and the plan that they resolve to."""
