"""One file per paper: a method combines the parts of `qdiff.calibration`."""
