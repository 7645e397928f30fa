"""One file a paper: a method is a recipe over the parts of `qdiff.calibration`."""
