"""Tables, pages and plots of measured results."""
