"""Scaling studies: a family of sizes, a grid of rows, the runs, the fit, and what is drawn and said of it."""
