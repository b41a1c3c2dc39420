"""The rivals, a module each. What is not installed is left out of a run, and named."""
