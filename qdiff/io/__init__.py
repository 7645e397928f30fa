"""Files: reading, writing, downloading, progress."""
