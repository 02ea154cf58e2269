"""Measurements: not tests, run by hand or by the tests marked slow."""
