"""What the command lines share: options, run folder, errors, images."""
