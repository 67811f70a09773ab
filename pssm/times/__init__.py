"""Labels of time steps: what they are, the grid that they stand on, and how they go on."""
