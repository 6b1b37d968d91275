"""Weights: models whose parameters are read, made and written part by part, so that no process holds all of one."""
