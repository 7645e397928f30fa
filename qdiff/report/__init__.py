"""Tables, pages and plots of what was measured."""
