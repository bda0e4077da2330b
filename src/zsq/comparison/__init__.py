"""Grids of runs, their statistics, tables and figures."""
